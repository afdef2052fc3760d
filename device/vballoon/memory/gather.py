# SPDX-License-Identifier: Apache-2.0
"""Many small reads of guest memory as one: the readable side of a whole batch of buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vballoon.errors import MemoryFault
from vballoon.memory.pages import PAGE_SHIFT, PAGE_SIZE
from vballoon.memory.ranges import PageRanges
from vballoon.native import native

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vballoon.memory.table import GuestMemory

__all__ = ("gather_u32", "page_ranges", "ranges_of")

_SHIFT, _ONE_PAGE = np.uint64(PAGE_SHIFT), np.uint64(1)

FEW_RUNS = 1 << 15
"""Runs that room is made for at first: room for a run of each page number is so much that finding
the memory can take longer than reading the numbers."""

SLICE_WORDS = 128
"""From this many words on, copying a slice costs less than indexing its words one by one."""


def page_ranges(
    memory: GuestMemory, addr: NDArray[np.uint64], words: NDArray[np.int64]
) -> tuple[PageRanges, int]:
    """Return the pages whose 32-bit numbers are at each *addr*, and the number of bad ones.

    *words* (int64[n]) is how many numbers there are at each address (uint64[n], bytes).  Numbers
    of pages outside guest memory are bad.
    Raise :class:`~vballoon.errors.MemoryFault` for an address outside guest memory.
    """
    if native is not None:
        total = int(words.sum())
        for room in (min(total, FEW_RUNS), total):
            start, end = np.empty(room, np.uint64), np.empty(room, np.uint64)
            found = native.page_runs(memory.tables, addr, words, start, end)
            if found is not None:
                return PageRanges.merged(start[: found[0]], end[: found[0]]), found[1]
            if room == total:
                break
    return ranges_of(memory, gather_u32(memory, addr, words))


def ranges_of(memory: GuestMemory, pfns: NDArray[np.uint32]) -> tuple[PageRanges, int]:
    """Return :func:`page_ranges` of numbers that have been read (uint32[n])."""
    start = pfns.astype(np.uint64)  # widen first: a 32-bit shift by 12 would wrap
    inside = memory.contains(start << _SHIFT, np.full(start.size, PAGE_SIZE, np.uint64))
    bad = start.size - int(np.count_nonzero(inside))
    if bad:
        start = start[inside]
    return PageRanges(start, start + _ONE_PAGE), bad


def gather_u32(
    memory: GuestMemory, addr: NDArray[np.uint64], words: NDArray[np.int64]
) -> NDArray[np.uint32]:
    """Return the little-endian 32-bit words at each *addr* (uint64[n], bytes), as uint32[sum].

    *words* (int64[n]) is how many to read at each.  Every word is read once.  Raise
    :class:`~vballoon.errors.MemoryFault` for an address outside guest memory.
    """
    total = int(words.sum())
    if total >= SLICE_WORDS * addr.size or not memory.mapped or (addr & np.uint64(3)).any():
        return _by_slices(memory, addr, words)
    try:
        region, offset = memory.locate(addr, words.astype(np.uint64) * np.uint64(4))
    except MemoryFault:
        return _by_slices(memory, addr, words)
    first = np.cumsum(words) - words
    base = (offset >> np.uint64(2)).astype(np.int64) - first
    index = np.repeat(base, words) + np.arange(total)
    if (region == region[0]).all():
        return _words(memory, int(region[0]))[index]
    owner = np.repeat(region, words)
    out = np.empty(total, dtype=np.uint32)
    for number in np.unique(region).tolist():
        mine = owner == number
        out[mine] = _words(memory, number)[index[mine]]
    return out


def _words(memory: GuestMemory, region: int) -> NDArray[np.uint32]:
    view = memory.regions[region].view
    assert view is not None  # the caller has seen that all memory is mapped
    return view[: view.size & ~3].view("<u4")


def _by_slices(
    memory: GuestMemory, addr: NDArray[np.uint64], words: NDArray[np.int64]
) -> NDArray[np.uint32]:
    parts = [
        memory.read(at, 4 * count)
        for at, count in zip(addr.tolist(), words.tolist(), strict=True)
        if count
    ]
    return np.frombuffer(b"".join(parts), dtype="<u4")
