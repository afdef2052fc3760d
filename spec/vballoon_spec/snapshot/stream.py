# SPDX-License-Identifier: Apache-2.0
"""A snapshot as a stream: the magic, then frames; the last one is the manifest.

Each frame is a header and ``length`` bytes.  DATA goes to ``offset`` of the file of guest memory
whose place in the manifest is ``file``; STATE is the next piece of the device state; MANIFEST is
``manifest.json`` and ends the stream.  A stream that ends without it is no snapshot.  SIZE comes
before the first DATA and has no body: ``offset`` is how many bytes of memory will follow, so that
a reader without space for them reports it while the machine is still at its old place.
"""

from __future__ import annotations

from enum import IntEnum

import construct as c

from virtio_formats.wire import WireStruct

__all__ = ("MOVE_MAGIC", "STREAM_MAGIC", "Frame", "FrameKind")

STREAM_MAGIC = b"VBSNAP01"
MOVE_MAGIC = b"VBMOVE01"
"""Begins the stream of a move: after MANIFEST both sides exchange COMMIT, VERIFIED and so on.

The body of COMMIT, VERIFIED and RUNNING is the SHA-256 of the manifest.
"""


class FrameKind(IntEnum):
    """What follows a frame's header."""

    DATA = 1
    STATE = 2
    MANIFEST = 3
    SIZE = 4
    COMMIT = 16
    """Of a move, from the source: run the guest."""
    VERIFIED = 17
    """From the destination: the snapshot is complete, checked and on disk."""
    RUNNING = 18
    """From the destination: the guest runs."""
    ABORT = 20
    """From the source: COMMIT will never come, the guest runs where it was."""
    REFUSED = 19
    """From the destination: it will not run the guest by itself; the body is UTF-8 text."""


class Frame(WireStruct):
    """Header of a frame, little-endian; ``offset`` and ``length`` are bytes."""

    kind: int
    file: int = 0
    offset: int = 0
    length: int

    SUBCON = c.Struct(
        "kind" / c.Int32ul,
        "file" / c.Int32ul,
        "offset" / c.Int64ul,
        "length" / c.Int64ul,
    )
