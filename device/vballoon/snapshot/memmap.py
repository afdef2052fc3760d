# SPDX-License-Identifier: Apache-2.0
"""Verified skip: read which pages of a *stopped* guest are in its buddy lists.

The guest module has sent where the guest keeps its page structures (MEMMAP buffers,
``vballoon_spec/walk/walk-queue.md``, *Memory map*).  This module reads that array by columns and
takes every block that is marked as free and passes the checks of WALK-D15.  Nothing that the guest
sent earlier is trusted: a layout that differs in any detail from what is in memory now is refused,
and then everything is copied.

A guest can be stopped while it changes its free lists.  A block that is being added or removed is
marked but not linked; such blocks are dropped.  Each zone has a lock, so there are few of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vballoon.errors import MemoryFault, VballoonError
from vballoon.memory import PAGE_SHIFT, PageRanges

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vballoon.balloon.memmap import MemmapLayout
    from vballoon.memory import GuestMemory
    from vballoon_spec.walk.formats import WalkMemmap

    U64 = NDArray[np.uint64]

__all__ = ("FreeMemory", "VerificationRefused", "free_memory")

STRUCTURE_MAX = 4096
"""Maximum bytes of a page structure; Linux has 56 to 96."""
ORDER_MAX = 30
"""Largest accepted order; Linux stops at 10 (18 GiB blocks would be order 22)."""
LOOSE_MAX = 64
"""Maximum blocks that are marked but not linked: a list that is being changed has at most four,
and in each zone only one list can be."""
LISTS_MAX = 16
"""Maximum lists of free blocks of one zone and order: one per migrate type, up to 7 in Linux."""
PAGES_MAX = 1 << 40
"""Maximum guest page number: 52 bits of guest-physical address."""
RUN_CHUNK = 1 << 18
"""Structures read at a time (16 MiB), which bounds the temporary arrays."""


class VerificationRefused(VballoonError):
    """The layout is refused, so no page counts as free. The text says what was wrong."""


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """The free blocks of a stopped guest.

    ``ranges``: their pages; ``blocks``: how many blocks these are; ``pages``: how many pages;
    ``loose``: blocks that were marked as free but not linked, and are not among them.
    """

    ranges: PageRanges
    blocks: int
    pages: int
    loose: int


@dataclass(slots=True)
class _Heads:
    """Columns of the structures that are marked as the head of a free block."""

    pfn: U64
    order: U64
    following: U64
    preceding: U64
    node_zone: U64


def free_memory(
    layout: MemmapLayout, memory: GuestMemory, *, managed_pages: int | None = None
) -> FreeMemory:
    """Return the free blocks of the stopped guest in *memory* according to *layout*.

    *managed_pages*: guest pages that the guest's allocator manages, if known; more cannot be free.
    Raise :class:`VerificationRefused` where any check of WALK-D15 fails.
    """
    header = layout.header
    _check_header(header)
    runs = _checked_runs(layout, memory)
    _check_witness(header, runs, memory)
    heads = _heads(header, runs, memory)
    _check_blocks(header, runs, heads)
    linked = _linked(header, heads)
    loose = int(linked.size - np.count_nonzero(linked))
    if loose > LOOSE_MAX:
        raise VerificationRefused(f"{loose} blocks are marked as free, but in no list")
    pages = np.uint64(1) << heads.order[linked]
    if managed_pages is not None and int(pages.sum()) > managed_pages:
        raise VerificationRefused(f"{int(pages.sum())} pages free of {managed_pages}")
    return _as_ranges(heads.pfn[linked], pages, header, memory, loose)


def _check_header(header: WalkMemmap) -> None:
    """Refuse constants with which no column can be read, or every word would match."""
    size = header.size
    fields = (
        (header.type_offset, 4),
        (header.order_offset, 8),
        (header.refcount_offset, 4),
        (header.list_offset, 16),
        (header.flags_offset, 8),
    )
    if not 8 <= size <= STRUCTURE_MAX or size % 8:
        raise VerificationRefused(f"page structures of {size} bytes")
    if any(offset + width > size or offset % min(width, 8) for offset, width in fields):
        raise VerificationRefused("a field is outside its page structure")
    if not PAGE_SHIFT <= header.page_shift <= 16 or header.max_order > ORDER_MAX:
        raise VerificationRefused(f"page shift {header.page_shift}, order {header.max_order}")
    if not header.type_mask or header.type_value & ~header.type_mask:
        raise VerificationRefused("the mark of a free block would match every page")
    if header.node_shift > 63 or header.zone_shift > 63:
        raise VerificationRefused("node or zone are outside their word")
    if header.witness_value <= ORDER_MAX:
        raise VerificationRefused("witness value too weak to be unique")


def _checked_runs(layout: MemmapLayout, memory: GuestMemory) -> NDArray[Any]:
    """Return the runs sorted by page number [WALK-R14, WALK-D13]."""
    runs = layout.runs[np.argsort(layout.runs["pfn"], kind="stable")]
    if not runs.size:
        raise VerificationRefused("a layout without runs")
    pages_max = np.uint64(PAGES_MAX)
    if (runs["num"] == 0).any() or (runs["num"] > pages_max).any():
        raise VerificationRefused("a run is empty, or larger than guest memory can be")
    if (runs["pfn"] > pages_max - runs["num"]).any():
        raise VerificationRefused("a run wraps around")
    length = runs["num"] * np.uint64(layout.header.size)
    if not memory.contains(runs["addr"], length).all():
        raise VerificationRefused("page structures outside guest memory")
    by_address = np.argsort(runs["addr"], kind="stable")
    for start, size in ((runs["pfn"], runs["num"]), (runs["addr"][by_address], length[by_address])):
        if (start[:-1] + size[:-1] > start[1:]).any():
            raise VerificationRefused("runs overlap")
    return runs


def _check_witness(header: WalkMemmap, runs: NDArray[Any], memory: GuestMemory) -> None:
    """Check the random number that the driver keeps in a page structure that it owns."""
    index = int(np.searchsorted(runs["pfn"], np.uint64(header.witness_pfn), side="right")) - 1
    run = runs[max(index, 0)]
    place = header.witness_pfn - int(run["pfn"])
    if index < 0 or place >= int(run["num"]):
        raise VerificationRefused("the witness is in no run")
    structure = memory.read(int(run["addr"]) + place * header.size, header.size)
    at = header.order_offset
    if int.from_bytes(structure[at : at + 8], "little") != header.witness_value:
        raise VerificationRefused("the witness value is missing: another kernel, or another layout")
    flags = int.from_bytes(structure[header.flags_offset :][:8], "little")
    if not _in_place(header, np.array([flags], np.uint64), run):
        raise VerificationRefused("the witness is in another node or zone")


def _in_place(header: WalkMemmap, flags: U64, run: np.void) -> bool:
    node = (flags >> np.uint64(header.node_shift)) & np.uint64(header.node_mask)
    zone = (flags >> np.uint64(header.zone_shift)) & np.uint64(header.zone_mask)
    return bool((node == run["node"]).all() and (zone == run["zone"]).all())


def _heads(header: WalkMemmap, runs: NDArray[Any], memory: GuestMemory) -> _Heads:
    """Read the columns of all runs. Refuse structures of another node or zone than their run."""
    found = []
    for run in runs:
        for first in range(0, int(run["num"]), RUN_CHUNK):
            num = min(RUN_CHUNK, int(run["num"]) - first)
            found.append(_heads_of(header, run, first, num, memory))
    columns = [np.concatenate([part[i] for part in found]) for i in range(5)]
    return _Heads(*columns)


def _heads_of(
    header: WalkMemmap, run: np.void, first: int, num: int, memory: GuestMemory
) -> tuple[U64, U64, U64, U64, U64]:
    structures = _bytes_at(memory, int(run["addr"]) + first * header.size, num * header.size)

    def column(offset: int, kind: str) -> NDArray[Any]:
        return np.ndarray((num,), kind, structures, offset, (header.size,))

    marks = column(header.type_offset, "<u4")
    at = np.flatnonzero(marks & np.uint32(header.type_mask) == np.uint32(header.type_value))
    if column(header.refcount_offset, "<u4")[at].any():
        raise VerificationRefused("a free block has references")
    if not _in_place(header, column(header.flags_offset, "<u8")[at], run):
        raise VerificationRefused("a page structure is in another node or zone than its run")
    place = np.uint64(int(run["node"]) << 32 | int(run["zone"]))
    return (
        at.astype(np.uint64) + np.uint64(int(run["pfn"]) + first),
        column(header.order_offset, "<u8")[at],
        column(header.list_offset, "<u8")[at],
        column(header.list_offset + 8, "<u8")[at],
        np.full(at.size, place),
    )


def _bytes_at(memory: GuestMemory, addr: int, size: int) -> NDArray[np.uint8]:
    """Return guest memory, without a copy where it is in one region."""
    try:
        return memory.window(addr, size)
    except MemoryFault:
        return np.frombuffer(memory.read(addr, size), np.uint8)


def _check_blocks(header: WalkMemmap, runs: NDArray[Any], heads: _Heads) -> None:
    """Check order and alignment, and that no block overlaps another or leaves its node and zone."""
    if (heads.order > header.max_order).any():
        raise VerificationRefused("a free block has an impossible order")
    pages = np.uint64(1) << heads.order
    if (heads.pfn & (pages - np.uint64(1))).any():
        raise VerificationRefused("a free block is not aligned to its order")
    end = heads.pfn + pages
    if (end[:-1] > heads.pfn[1:]).any():
        raise VerificationRefused("free blocks overlap")
    areas = _areas(runs)
    index = np.searchsorted(areas["pfn"], heads.pfn, side="right") - 1
    if (end > areas["pfn"][index] + areas["num"][index]).any():
        raise VerificationRefused("a free block leaves its node and zone")


def _areas(runs: NDArray[Any]) -> NDArray[Any]:
    """Return the runs with adjacent ones of the same node and zone merged."""
    apart = (runs["pfn"][1:] != runs["pfn"][:-1] + runs["num"][:-1]) | (
        (runs["node"][1:] != runs["node"][:-1]) | (runs["zone"][1:] != runs["zone"][:-1])
    )
    first = np.flatnonzero(np.append(True, apart))
    areas = runs[first].copy()
    areas["num"] = np.add.reduceat(runs["num"], first)
    return areas


def _linked(header: WalkMemmap, heads: _Heads) -> NDArray[np.bool_]:
    """Return which blocks are in a list: each neighbour that is a page structure points back.

    Any other neighbour can only be the list's head, which has one first and one last block.
    """
    own = np.uint64(header.base) + heads.pfn * np.uint64(header.size)
    own += np.uint64(header.list_offset)
    by_address = np.argsort(own)
    after, after_is_page = _look_up(own, by_address, heads.following, header)
    before, before_is_page = _look_up(own, by_address, heads.preceding, header)
    good = np.where(after_is_page, _at(heads.preceding, after) == own, False)
    good_before = np.where(before_is_page, _at(heads.following, before) == own, False)
    last = ~after_is_page & (after != -2)
    first = ~before_is_page & (before != -2)
    anchors = _paired(heads.following[last], heads.preceding[first])
    good[last] = np.isin(heads.following[last], anchors)
    good_before[first] = np.isin(heads.preceding[first], anchors)
    _check_anchors(heads, first & good_before)
    linked: NDArray[np.bool_] = good & good_before & (heads.following != own)
    return linked


def _check_anchors(heads: _Heads, first: NDArray[np.bool_]) -> None:
    """Refuse more lists than Linux has: then the base is wrong, and no neighbour was found."""
    lists = np.column_stack((heads.node_zone[first], heads.order[first]))
    if np.unique(lists, axis=0, return_counts=True)[1].max(initial=0) > LISTS_MAX:
        raise VerificationRefused("free blocks are in more lists than Linux has")


def _look_up(
    own: U64, by_address: NDArray[np.intp], wanted: U64, header: WalkMemmap
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return the index of the head whose list node is at *wanted*; -2: a page structure, no head.

    The second array is True where there is such a head.
    """
    ordered = own[by_address]
    place = np.minimum(np.searchsorted(ordered, wanted), max(ordered.size - 1, 0))
    found = ordered[place] == wanted if ordered.size else np.zeros(0, np.bool_)
    low = np.uint64(header.base)
    with np.errstate(over="ignore"):  # the base is untrusted
        inside = wanted - low < own.max(initial=low) - low + np.uint64(header.size)
    index = np.where(found, by_address[place], np.where(inside, -2, -1))
    return index, found


def _at(column: U64, index: NDArray[np.intp]) -> U64:
    return column[np.maximum(index, 0)] if column.size else column


def _paired(ends: U64, starts: U64) -> U64:
    """Return the addresses that are the end of exactly one list and the start of exactly one."""
    end_values, end_counts = np.unique(ends, return_counts=True)
    start_values, start_counts = np.unique(starts, return_counts=True)
    both = np.intersect1d(end_values[end_counts == 1], start_values[start_counts == 1])
    anchors: U64 = both[both != 0]
    return anchors


def _as_ranges(
    pfn: U64, pages: U64, header: WalkMemmap, memory: GuestMemory, loose: int
) -> FreeMemory:
    shift = np.uint64(header.page_shift - PAGE_SHIFT)
    start, size = pfn << shift, pages << shift
    unit = np.uint64(PAGE_SHIFT)
    if not memory.contains(start << unit, size << unit).all():
        raise VerificationRefused("a free block is outside guest memory")
    return FreeMemory(PageRanges(start, start + size), int(pfn.size), int(size.sum()), loose)
