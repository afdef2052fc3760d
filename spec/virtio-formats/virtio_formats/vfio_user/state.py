# SPDX-License-Identifier: Apache-2.0
"""The packed state of a vfio-user server: what outlives its process, or travels with a guest.

This format is the project's own, not the protocol's.  A packed state is a :class:`StateFrame`
followed by one body: a :class:`BaseBody` (the PCI function as the guest sees it) or a
:class:`SessionBody` (one connection, and what its client has set up).  Little-endian.
"""

from __future__ import annotations

import enum
import zlib
from typing import Any

from virtio_formats.declare import c
from virtio_formats.wire import WireError, WireStruct

__all__ = (
    "BASE_MAGIC",
    "NONE_32",
    "SESSION_MAGIC",
    "STATE_VERSION",
    "BaseBody",
    "IrqStateFlag",
    "SessionBody",
    "SessionFlag",
    "StateFrame",
    "seal",
    "unseal",
)

BASE_MAGIC = 0x42504656
"""``VFPB``, little-endian."""
SESSION_MAGIC = 0x53504656
"""``VFPS``, little-endian."""
STATE_VERSION = 1
"""Raised whenever the layout changes."""
NONE_32 = 0xFFFFFFFF
"""A 32-bit field that holds no number: no descriptor slot, no index."""


class StateFrame(WireStruct):
    """The head of a packed state; *size* and *crc32* are those of the body in bytes."""

    magic: int
    version: int = STATE_VERSION
    reserved: int = 0
    size: int
    crc32: int

    SUBCON = c.Struct(
        "magic" / c.Int32ul,
        "version" / c.Int16ul,
        "reserved" / c.Int16ul,
        "size" / c.Int32ul,
        "crc32" / c.Int32ul,
    )


def seal(magic: int, body: bytes) -> bytes:
    """Return *body* after its frame."""
    return StateFrame(magic=magic, size=len(body), crc32=zlib.crc32(body)).build() + body


def unseal(magic: int, packed: bytes) -> bytes:
    """Return the body of a packed state.

    Raise :class:`~virtio_formats.wire.WireError` for another kind of state, another version,
    another size, or a wrong checksum.
    """
    head = StateFrame.parse(packed[: StateFrame.SIZE])
    body = packed[StateFrame.SIZE :]
    if (head.magic, head.version, head.reserved) != (magic, STATE_VERSION, 0):
        raise WireError(f"state of kind {head.magic:#x}, version {head.version}")
    if head.size != len(body) or head.crc32 != zlib.crc32(body):
        raise WireError("a damaged state")
    return body


class IrqStateFlag(enum.IntFlag):
    """State of one interrupt vector."""

    PENDING = 1 << 0
    """An edge could not be delivered yet."""
    BARRED = 1 << 1
    """Masked by the function (the mask bit of its MSI-X table entry)."""
    MASKED = 1 << 2
    """Masked by the client (DEVICE_SET_IRQS)."""


class BaseBody(WireStruct):
    """The PCI function as the guest sees it.

    *intx* is the level of the pin, *held* has a bit for each interrupt index that is masked as a
    whole; *vectors* lists (index, vector, :class:`IrqStateFlag`) where a flag is set.
    """

    intx: int
    held: int
    config: bytes
    vectors: list[Any]

    SUBCON = c.Struct(
        "intx" / c.Int8ul,
        "held" / c.Int8ul,
        "config" / c.Prefixed(c.Int16ul, c.GreedyBytes),
        "vectors"
        / c.PrefixedArray(
            c.Int16ul,
            c.Struct("index" / c.Int8ul, "flags" / c.Int8ul, "vector" / c.Int16ul),
        ),
    )


class SessionFlag(enum.IntFlag):
    """What a session has."""

    NEGOTIATED = 1 << 0
    TWIN = 1 << 1
    """Server commands go over a socket of their own."""
    LOGGING = 1 << 2
    """DMA logging is active."""
    CLIENT_TWIN = 1 << 3
    """The client proposed a twin socket."""
    CLIENT_WRITE_MULTIPLE = 1 << 4
    CLIENT_MIGRATION_PGSIZE = 1 << 5
    CLIENT_MIGRATION_MAX_BITMAP_SIZE = 1 << 6


class SessionBody(WireStruct):
    """One connection, and what its client has set up on the device.

    *layout* is the offset of data in DMA messages (0: not known yet); *owed* are the identifiers
    of DMA messages that the client may still answer.  Descriptors are named by slot numbers,
    :data:`NONE_32` where there is none.  *base* is a packed base state, frame included.
    """

    flags: int
    minor: int
    layout: int
    next_id: int
    max_msg_fds: int
    max_data_xfer_size: int
    max_dma_maps: int
    pgsizes: int
    twin_fd_index: int
    migration_pgsize: int
    migration_max_bitmap_size: int
    owed: list[int]
    dma: list[Any]
    irqs: list[Any]
    ranges: list[Any]
    migration: int
    outgoing: bytes
    incoming: bytes
    base: bytes

    SUBCON = c.Struct(
        "flags" / c.Int32ul,
        "minor" / c.Int16ul,
        "layout" / c.Int8ul,
        "next_id" / c.Int16ul,
        "max_msg_fds" / c.Int32ul,
        "max_data_xfer_size" / c.Int64ul,
        "max_dma_maps" / c.Int64ul,
        "pgsizes" / c.Int64ul,
        "twin_fd_index" / c.Int32ul,
        "migration_pgsize" / c.Int64ul,
        "migration_max_bitmap_size" / c.Int64ul,
        "owed" / c.PrefixedArray(c.Int16ul, c.Int16ul),
        "dma"
        / c.PrefixedArray(
            c.Int32ul,
            c.Struct(
                "address" / c.Int64ul,
                "size" / c.Int64ul,
                "offset" / c.Int64ul,
                "flags" / c.Int32ul,
                "slot" / c.Int32ul,
            ),
        ),
        "irqs"
        / c.PrefixedArray(
            c.Int16ul,
            c.Struct(
                "index" / c.Int8ul,
                "flags" / c.Int8ul,
                "vector" / c.Int16ul,
                "trigger" / c.Int32ul,
                "on_mask" / c.Int32ul,
                "on_unmask" / c.Int32ul,
            ),
        ),
        "ranges" / c.PrefixedArray(c.Int32ul, c.Struct("iova" / c.Int64ul, "length" / c.Int64ul)),
        "migration" / c.Int8ul,
        "outgoing" / c.Prefixed(c.Int32ul, c.GreedyBytes),
        "incoming" / c.Prefixed(c.Int32ul, c.GreedyBytes),
        "base" / c.Prefixed(c.Int32ul, c.GreedyBytes),
    )
