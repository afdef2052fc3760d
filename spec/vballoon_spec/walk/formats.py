# SPDX-License-Identifier: Apache-2.0
"""The buffers of the walk queue, declared once.

Normative text: ``walk-queue.md`` in this folder; requirement ids are given as ``[WALK-D1]``.
All buffers are device-readable, little-endian and at most :data:`BUFFER_MAX` bytes long.  Each
begins with :class:`WalkHeader` (16 bytes, so that the records after it are 8-byte aligned) and
is complete in itself:

=========  =======================================================================================
type       what follows the header
=========  =======================================================================================
``BEGIN``  one :class:`WalkBegin`; ``num`` is 0
``RANGES`` ``num`` :class:`WalkRange` records
``END``    one :class:`WalkEnd`; ``num`` is 0
``MEMMAP`` one :class:`WalkMemmap`, then ``num`` :class:`WalkMemmapRun` records
=========  =======================================================================================

The length of a buffer is exactly what its type and ``num`` say (:func:`buffer_size`).  Page
numbers of ranges are guest-physical addresses divided by 4096 whatever the guest's page size is,
as everywhere in the balloon device; those of the memmap count the guest's own pages.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

import construct as c

from virtio_formats.wire import WireError, WireStruct

__all__ = (
    "BUFFER_MAX",
    "WALK_VQ",
    "WalkBegin",
    "WalkEnd",
    "WalkEndFlag",
    "WalkHeader",
    "WalkMemmap",
    "WalkMemmapFlag",
    "WalkMemmapRun",
    "WalkRange",
    "WalkType",
    "body_size",
    "buffer_size",
    "record_size",
)

BUFFER_MAX = 65536
"""Largest buffer in bytes, so that a device can bound the work of one [WALK-R2]."""

WALK_VQ = 5
"""Fixed number of the queue; Linux numbers it densely, after all others (*Virtqueues*)."""


class WalkType(IntEnum):
    """``type`` of a buffer; a device ignores and counts what it does not know [WALK-D4]."""

    BEGIN = 1
    RANGES = 2
    END = 3
    MEMMAP = 4


class WalkEndFlag(IntFlag):
    """``flags`` of END's header."""

    CUT = 1 << 0
    """A free list was left before its end: it changed faster than it could be read [WALK-R9]."""


class WalkMemmapFlag(IntFlag):
    """``flags`` of MEMMAP's header."""

    PARTIAL = 1 << 0
    """Some of the guest's memory is described by no run [WALK-R14]."""


class WalkHeader(WireStruct):
    """The first 16 bytes of every buffer.

    ``round``: the command id that the buffer belongs to, 0 for MEMMAP; ``seq``: 0 for BEGIN and
    then one more for each buffer of the round, for MEMMAP the place in its set; ``num``: records
    in the buffer.
    """

    type: int
    flags: int = 0
    round: int
    seq: int = 0
    num: int = 0

    SUBCON = c.Struct(
        "type" / c.Int16ul,
        "flags" / c.Int16ul,
        "round" / c.Int32ul,
        "seq" / c.Int32ul,
        "num" / c.Int32ul,
    )


class WalkBegin(WireStruct):
    """Body of BEGIN: how the walk is going to be done, and what the guest has.

    ``time_ns``: the guest's monotonic clock; ``managed_pages`` and ``free_pages``: what the
    allocator manages and has free just before the walk, in guest pages of ``1 << page_shift``
    bytes; ``min_order``: as applied (never above ``max_order``); ``slice_ns``: the bound that the
    driver puts on holding an allocator lock; ``layout_id``: of the memmap layout in force, 0 for
    none.
    """

    time_ns: int
    managed_pages: int
    free_pages: int
    page_shift: int
    min_order: int
    max_order: int
    nr_zones: int
    slice_ns: int
    layout_id: int

    SUBCON = c.Struct(
        "time_ns" / c.Int64ul,
        "managed_pages" / c.Int64ul,
        "free_pages" / c.Int64ul,
        "page_shift" / c.Int32ul,
        "min_order" / c.Int32ul,
        "max_order" / c.Int32ul,
        "nr_zones" / c.Int32ul,
        "slice_ns" / c.Int32ul,
        "layout_id" / c.Int32ul,
    )


class WalkRange(WireStruct):
    """One range of free pages: ``[pfn, pfn + num)`` in units of 4096 bytes."""

    pfn: int
    num: int

    SUBCON = c.Struct("pfn" / c.Int64ul, "num" / c.Int64ul)


class WalkEnd(WireStruct):
    """Body of END: what the round came to.

    ``time_ns``: guest's monotonic clock; ``duration_ns``: since BEGIN; ``blocks``: free blocks
    reported by the walk; ``ranges`` and ``pages`` (of 4096 bytes): sent in the round's RANGES
    buffers; ``free_pages``: as in BEGIN, just after the walk; ``longest_hold_ns``: longest time
    that an allocator lock was held; ``buffers``: RANGES buffers of the round; ``slices``: how
    often a lock was taken; ``result``: 0, the walk was complete; else the positive error number
    with which it stopped.
    """

    time_ns: int
    duration_ns: int
    blocks: int
    ranges: int
    pages: int
    free_pages: int
    longest_hold_ns: int
    buffers: int
    slices: int
    result: int

    SUBCON = c.Struct(
        "time_ns" / c.Int64ul,
        "duration_ns" / c.Int64ul,
        "blocks" / c.Int64ul,
        "ranges" / c.Int64ul,
        "pages" / c.Int64ul,
        "free_pages" / c.Int64ul,
        "longest_hold_ns" / c.Int32ul,
        "buffers" / c.Int32ul,
        "slices" / c.Int32ul,
        "result" / c.Int32ul,
    )


class WalkMemmap(WireStruct):
    """Body of MEMMAP: how to read the guest's page structures in its memory.

    A page structure describes the head of a free block of ``1 << order`` pages if the le32 at
    ``type_offset``, masked with ``type_mask``, equals ``type_value``; the order is then the le64
    at ``order_offset``.  The rest is there to refuse a layout that no longer holds:

    * ``witness_pfn``: a page that the driver keeps, whose structure has ``witness_value`` in the
      le64 at ``order_offset`` for as long as the layout holds;
    * ``refcount_offset``: a le32, 0 in a free block's head;
    * ``list_offset``: two le64 virtual addresses, next and previous list node of a free block's
      head. A node in another page structure is at ``base + size * pfn + list_offset``;
    * ``flags_offset``: a le64 that holds the structure's node (``node_shift``, ``node_mask``
      after the shift) and zone (``zone_shift``, ``zone_mask``), which must be those of the run.

    ``layout_id``: 1 or more, other for each layout of a boot; ``nr_buffers``, ``nr_runs``: of the
    whole set; ``page_shift``: log2 of the guest's page size; ``size``: bytes of a page structure;
    ``max_order``: largest order of a free block; ``section_pages``: granularity in which memory
    comes and goes.
    """

    witness_value: int
    witness_pfn: int
    base: int
    layout_id: int
    nr_buffers: int
    nr_runs: int
    page_shift: int
    size: int
    section_pages: int
    max_order: int
    type_offset: int
    type_mask: int
    type_value: int
    order_offset: int
    refcount_offset: int
    list_offset: int
    flags_offset: int
    node_shift: int
    node_mask: int
    zone_shift: int
    zone_mask: int

    SUBCON = c.Struct(
        "witness_value" / c.Int64ul,
        "witness_pfn" / c.Int64ul,
        "base" / c.Int64ul,
        "layout_id" / c.Int32ul,
        "nr_buffers" / c.Int32ul,
        "nr_runs" / c.Int32ul,
        "page_shift" / c.Int32ul,
        "size" / c.Int32ul,
        "section_pages" / c.Int32ul,
        "max_order" / c.Int32ul,
        "type_offset" / c.Int32ul,
        "type_mask" / c.Int32ul,
        "type_value" / c.Int32ul,
        "order_offset" / c.Int32ul,
        "refcount_offset" / c.Int32ul,
        "list_offset" / c.Int32ul,
        "flags_offset" / c.Int32ul,
        "node_shift" / c.Int32ul,
        "node_mask" / c.Int32ul,
        "zone_shift" / c.Int32ul,
        "zone_mask" / c.Int32ul,
    )


class WalkMemmapRun(WireStruct):
    """The page structures of guest pages ``[pfn, pfn + num)`` of one node and zone.

    They lie one after the other in guest-physical memory from ``addr`` on.
    """

    pfn: int
    num: int
    addr: int
    node: int
    zone: int

    SUBCON = c.Struct(
        "pfn" / c.Int64ul,
        "num" / c.Int64ul,
        "addr" / c.Int64ul,
        "node" / c.Int32ul,
        "zone" / c.Int32ul,
    )


_BODIES: dict[WalkType, type[WireStruct]] = {
    WalkType.BEGIN: WalkBegin,
    WalkType.END: WalkEnd,
    WalkType.MEMMAP: WalkMemmap,
}
_RECORDS: dict[WalkType, type[WireStruct]] = {
    WalkType.RANGES: WalkRange,
    WalkType.MEMMAP: WalkMemmapRun,
}


def body_size(kind: WalkType) -> int:
    """Return the number of bytes between a buffer's header and its records."""
    return _BODIES[kind].SIZE if kind in _BODIES else 0


def record_size(kind: WalkType) -> int:
    """Return the size of one record in bytes, 0 for a type without records."""
    return _RECORDS[kind].SIZE if kind in _RECORDS else 0


def buffer_size(header: WalkHeader) -> int:
    """Return the length in bytes that a buffer with this header must have [WALK-R2].

    Raise :class:`WireError` for an unknown type, records in a type that has none, no records in
    RANGES, or more than fit into :data:`BUFFER_MAX`.
    """
    try:
        kind = WalkType(header.type)
    except ValueError:
        raise WireError(f"walk buffer of unknown type {header.type}") from None
    if header.num and not record_size(kind):
        raise WireError(f"walk buffer {kind.name} with {header.num} records")
    if kind is WalkType.RANGES and not header.num:
        raise WireError("walk buffer RANGES without records")
    size = WalkHeader.SIZE + body_size(kind) + header.num * record_size(kind)
    if size > BUFFER_MAX:
        raise WireError(f"walk buffer {kind.name} of {size} bytes")
    return size
