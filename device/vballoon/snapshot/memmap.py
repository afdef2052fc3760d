# SPDX-License-Identifier: Apache-2.0
"""Verified skip: which pages of a *stopped* guest are in its buddy lists, read from its own memory.

The guest module has told where the guest keeps its page structures (MEMMAP buffers,
``vballoon_spec/walk/walk-queue.md``, *Memory map*).  Here that array is read by columns, and every
block in it that is marked as free is taken if it passes the checks of WALK-D15.  Nothing the guest
said earlier is believed: a layout that does not fit what is found in memory now, by the smallest
detail, is refused, and then everything is copied.

A guest can be stopped in the middle of a change of its free lists.  A block that is just being
taken out or put in is marked but not linked properly; such blocks are dropped one by one, and as
each zone has a lock there can only be a few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vballoon.errors import MemoryFault, VballoonError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vballoon.balloon.memmap import MemmapLayout
    from vballoon.memory import GuestMemory
    from vballoon_spec.walk.formats import WalkMemmap

    U64 = NDArray[np.uint64]

__all__ = ("FreeMemory", "VerificationRefused", "free_memory")

STRUCTURE_MAX = 4096
"""Bytes of a page structure, at most; Linux has 56 to 96."""
ORDER_MAX = 30
"""Largest order that is believed; Linux stops at 10 (18 GiB blocks would be order 22)."""
LOOSE_MAX = 64
"""Blocks that may be marked but not linked: a list that is being changed has four at most, and
only one list of each zone can be."""
LISTS_MAX = 16
"""Lists of free blocks of one zone and order: one for each migrate type, Linux has up to 7."""
PAGES_MAX = 1 << 40
"""Guest pages that can have a number: 52 bits of guest-physical address."""
RUN_CHUNK = 1 << 18
"""Structures looked at in one go (16 MiB of them), which bounds the temporaries."""


class VerificationRefused(VballoonError):
    """The layout is not believed: no page counts as free.  The text says what was wrong."""


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """The free blocks of a stopped guest.

    ``ranges``: uint64[k, 2], half open, in pages of 4096 bytes, ascending and disjoint; ``blocks``:
    how many blocks these are; ``pages``: how many pages; ``loose``: blocks that were marked as
    free but not linked, and are not among them.
    """

    ranges: U64
    blocks: int
    pages: int
    loose: int


@dataclass(slots=True)
class _Heads:
    """Columns of the structures that are marked as a free block's head."""

    pfn: U64
    order: U64
    following: U64
    preceding: U64
    node_zone: U64


def free_memory(
    layout: MemmapLayout, memory: GuestMemory, *, managed_pages: int | None = None
) -> FreeMemory:
    """The free blocks of the stopped guest in *memory* by *layout*.

    *managed_pages*: what the guest's allocator manages, in guest pages, if known: more cannot be
    free.  Raises :class:`VerificationRefused` where anything is off.
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
    """Refuse constants with which no column can be read, or any word would match."""
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
        raise VerificationRefused("a field lies outside its page structure")
    if not 12 <= header.page_shift <= 16 or header.max_order > ORDER_MAX:
        raise VerificationRefused(f"page shift {header.page_shift}, order {header.max_order}")
    if not header.type_mask or header.type_value & ~header.type_mask:
        raise VerificationRefused("the mark of a free block marks nothing")
    if header.node_shift > 63 or header.zone_shift > 63:
        raise VerificationRefused("node or zone lie outside their word")
    if header.witness_value <= ORDER_MAX:
        raise VerificationRefused("the witness could be anybody")


def _checked_runs(layout: MemmapLayout, memory: GuestMemory) -> NDArray[Any]:
    """The runs by page number [WALK-R14, WALK-D13]."""
    runs = layout.runs[np.argsort(layout.runs["pfn"], kind="stable")]
    if not runs.size:
        raise VerificationRefused("a layout without runs")
    pages_max = np.uint64(PAGES_MAX)
    if (runs["num"] == 0).any() or (runs["num"] > pages_max).any():
        raise VerificationRefused("a run of no pages, or of more than there are")
    if (runs["pfn"] > pages_max - runs["num"]).any():
        raise VerificationRefused("a run wraps")
    length = runs["num"] * np.uint64(layout.header.size)
    if not memory.contains(runs["addr"], length).all():
        raise VerificationRefused("page structures outside guest memory")
    by_address = np.argsort(runs["addr"], kind="stable")
    for start, size in ((runs["pfn"], runs["num"]), (runs["addr"][by_address], length[by_address])):
        if (start[:-1] + size[:-1] > start[1:]).any():
            raise VerificationRefused("runs overlap")
    return runs


def _check_witness(header: WalkMemmap, runs: NDArray[Any], memory: GuestMemory) -> None:
    """See the random number that the driver keeps in a structure of its own."""
    index = int(np.searchsorted(runs["pfn"], np.uint64(header.witness_pfn), side="right")) - 1
    run = runs[max(index, 0)]
    place = header.witness_pfn - int(run["pfn"])
    if index < 0 or place >= int(run["num"]):
        raise VerificationRefused("the witness is in no run")
    structure = memory.read(int(run["addr"]) + place * header.size, header.size)
    at = header.order_offset
    if int.from_bytes(structure[at : at + 8], "little") != header.witness_value:
        raise VerificationRefused("the witness is not there: another kernel, or another layout")
    flags = int.from_bytes(structure[header.flags_offset :][:8], "little")
    if not _in_place(header, np.array([flags], np.uint64), run):
        raise VerificationRefused("the witness is of another node or zone")


def _in_place(header: WalkMemmap, flags: U64, run: np.void) -> bool:
    node = (flags >> np.uint64(header.node_shift)) & np.uint64(header.node_mask)
    zone = (flags >> np.uint64(header.zone_shift)) & np.uint64(header.zone_mask)
    return bool((node == run["node"]).all() and (zone == run["zone"]).all())


def _heads(header: WalkMemmap, runs: NDArray[Any], memory: GuestMemory) -> _Heads:
    """Read the columns of all runs; refuses structures of a node or zone not their run's."""
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
        raise VerificationRefused("a free block that somebody refers to")
    if not _in_place(header, column(header.flags_offset, "<u8")[at], run):
        raise VerificationRefused("a page structure is of another node or zone than its run")
    place = np.uint64(int(run["node"]) << 32 | int(run["zone"]))
    return (
        at.astype(np.uint64) + np.uint64(int(run["pfn"]) + first),
        column(header.order_offset, "<u8")[at],
        column(header.list_offset, "<u8")[at],
        column(header.list_offset + 8, "<u8")[at],
        np.full(at.size, place),
    )


def _bytes_at(memory: GuestMemory, addr: int, size: int) -> NDArray[np.uint8]:
    """Guest memory without a copy where it lies in one region."""
    try:
        return memory.window(addr, size)
    except MemoryFault:
        return np.frombuffer(memory.read(addr, size), np.uint8)


def _check_blocks(header: WalkMemmap, runs: NDArray[Any], heads: _Heads) -> None:
    """Orders, alignment, that blocks do not overlap and lie in runs of one node and zone."""
    if (heads.order > header.max_order).any():
        raise VerificationRefused("a free block of impossible order")
    pages = np.uint64(1) << heads.order
    if (heads.pfn & (pages - np.uint64(1))).any():
        raise VerificationRefused("a free block that is not aligned to its order")
    end = heads.pfn + pages
    if (end[:-1] > heads.pfn[1:]).any():
        raise VerificationRefused("free blocks overlap")
    areas = _areas(runs)
    index = np.searchsorted(areas["pfn"], heads.pfn, side="right") - 1
    if (end > areas["pfn"][index] + areas["num"][index]).any():
        raise VerificationRefused("a free block leaves its node and zone")


def _areas(runs: NDArray[Any]) -> NDArray[Any]:
    """Runs that follow one another in the same node and zone, as one."""
    apart = (runs["pfn"][1:] != runs["pfn"][:-1] + runs["num"][:-1]) | (
        (runs["node"][1:] != runs["node"][:-1]) | (runs["zone"][1:] != runs["zone"][:-1])
    )
    first = np.flatnonzero(np.append(True, apart))
    areas = runs[first].copy()
    areas["num"] = np.add.reduceat(runs["num"], first)
    return areas


def _linked(header: WalkMemmap, heads: _Heads) -> NDArray[np.bool_]:
    """Which blocks are in a list: each neighbour, where it is a page structure, points back.

    A neighbour that is none can only be the list's own head, which has one first and one last.
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
    """Refuse more lists than there can be: then the base is wrong, and nothing was a neighbour."""
    lists = np.column_stack((heads.node_zone[first], heads.order[first]))
    if np.unique(lists, axis=0, return_counts=True)[1].max(initial=0) > LISTS_MAX:
        raise VerificationRefused("free blocks in more lists than there are")


def _look_up(
    own: U64, by_address: NDArray[np.intp], wanted: U64, header: WalkMemmap
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Index of the head with its list node at *wanted*; -2: in the page structures, but no head.

    The second array is True where there is such a head.
    """
    ordered = own[by_address]
    place = np.minimum(np.searchsorted(ordered, wanted), max(ordered.size - 1, 0))
    found = ordered[place] == wanted if ordered.size else np.zeros(0, np.bool_)
    low = np.uint64(header.base)
    with np.errstate(over="ignore"):  # the base is the guest's word
        inside = wanted - low < own.max(initial=low) - low + np.uint64(header.size)
    index = np.where(found, by_address[place], np.where(inside, -2, -1))
    return index, found


def _at(column: U64, index: NDArray[np.intp]) -> U64:
    return column[np.maximum(index, 0)] if column.size else column


def _paired(ends: U64, starts: U64) -> U64:
    """Addresses that are exactly once a list's end and exactly once its start."""
    end_values, end_counts = np.unique(ends, return_counts=True)
    start_values, start_counts = np.unique(starts, return_counts=True)
    both = np.intersect1d(end_values[end_counts == 1], start_values[start_counts == 1])
    anchors: U64 = both[both != 0]
    return anchors


def _as_ranges(
    pfn: U64, pages: U64, header: WalkMemmap, memory: GuestMemory, loose: int
) -> FreeMemory:
    shift = np.uint64(header.page_shift - 12)
    start, size = pfn << shift, pages << shift
    if not memory.contains(start << np.uint64(12), size << np.uint64(12)).all():
        raise VerificationRefused("a free block that is not guest memory")
    end = start + size
    apart = start[1:] != end[:-1]
    first, last = np.append(True, apart)[: start.size], np.append(apart, True)[: start.size]
    ranges = np.column_stack((start[first], end[last]))
    return FreeMemory(ranges, int(pfn.size), int(size.sum()), loose)
