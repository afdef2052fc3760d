# SPDX-License-Identifier: Apache-2.0
"""The live bitmap: the first page of the memory descriptor that ``get-skip-bitmap-fd`` hands out.

Where each bitmap lies behind it is in the command's reply.  A reader that wants the bits of a round
reads the header, copies the bits, and reads the header again: the copy may be used when both times
the state is complete and the round and the generation are the same.
"""

from __future__ import annotations

from enum import IntEnum

import construct as c

from virtio_formats.wire import WireStruct

__all__ = ("LIVE_MAGIC", "LIVE_VERSION", "LiveHeader", "LiveRoundState")

LIVE_MAGIC = b"VBSKIPMP"
LIVE_VERSION = 1


class LiveRoundState(IntEnum):
    """What may be done with the bits of a round."""

    NONE = 0
    """No round of this kind yet: the bitmap is empty."""
    RUNNING = 1
    COMPLETE = 2
    """The guest has told everything; the safety rule's other half (writes) is the reader's."""
    INCOMPLETE = 3
    """Ended early: what is set was said by the guest, but it is not all."""
    VOID = 4
    """Reset, reboot, another memory table or a lost connection: the bitmap is empty."""


class LiveHeader(WireStruct):
    """All fields little-endian; times are CLOCK_MONOTONIC of the host, in nanoseconds."""

    magic: bytes
    version: int
    header_size: int
    """Bytes; bitmaps begin behind it."""
    generation: int
    """Grows by one each time that bits are voided."""
    live: int
    """1 while the device uses this map; 0: the guest memory it describes is gone."""
    page_shift: int
    hint_round: int
    hint_state: int
    hint_published: int
    walk_round: int
    walk_state: int
    walk_published: int

    SUBCON = c.Struct(
        "magic" / c.Bytes(8),
        "version" / c.Int32ul,
        "header_size" / c.Int32ul,
        "generation" / c.Int64ul,
        "live" / c.Int32ul,
        "page_shift" / c.Int32ul,
        "hint_round" / c.Int32ul,
        "hint_state" / c.Int32ul,
        "hint_published" / c.Int64ul,
        "walk_round" / c.Int32ul,
        "walk_state" / c.Int32ul,
        "walk_published" / c.Int64ul,
    )
