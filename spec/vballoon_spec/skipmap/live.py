# SPDX-License-Identifier: Apache-2.0
"""The header of the live bitmap: the first page of the memfd of ``get-skip-bitmap-fd``.

The reply of the command gives the offset of each bitmap after the header.  A reader that needs the
bits of a round reads the header, copies the bits, and reads the header again.  It may use the copy
if the state is complete in both headers and the round and the generation are equal.  Ballooned and
reported bits say what the driver did; README.md says what their reader must check.
"""

from __future__ import annotations

from enum import IntEnum

import construct as c

from virtio_formats.wire import WireStruct

__all__ = ("LIVE_MAGIC", "LIVE_VERSION", "LiveHeader", "LiveRoundState")

LIVE_MAGIC = b"VBSKIPMP"
LIVE_VERSION = 2


class LiveRoundState(IntEnum):
    """The state of a round, which decides whether its bits may be used."""

    NONE = 0
    """No round of this kind yet: the bitmap is empty."""
    RUNNING = 1
    COMPLETE = 2
    """The guest has sent all records; the reader must still exclude pages written since."""
    INCOMPLETE = 3
    """Ended early: the bits set are valid records of the guest, but not all of them."""
    VOID = 4
    """Voided by a reset, a reboot, a new memory table or a lost connection; the bitmap is empty."""


class LiveHeader(WireStruct):
    """All fields little-endian; times are CLOCK_MONOTONIC of the host, in nanoseconds."""

    magic: bytes
    version: int
    header_size: int
    """Size of the header in bytes; the bitmaps follow it."""
    generation: int
    """Incremented each time bits are voided."""
    live: int
    """1 while the device uses this map; 0 when the guest memory it describes is unmapped."""
    page_shift: int
    hint_round: int
    hint_state: int
    hint_published: int
    walk_round: int
    walk_state: int
    walk_published: int
    driver_running: int
    """1 while the driver that inflated the ballooned pages is known to run."""
    discards: int
    """1 where ballooned pages are freed: a reader must then check that each is still a hole."""

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
        "driver_running" / c.Int32ul,
        "discards" / c.Int32ul,
    )
