# SPDX-License-Identifier: Apache-2.0
"""The algebra of page ranges: pure functions on columns ``start``, ``end``.

A set of ranges is two uint64 arrays of the same length, half open, in pages or in bytes as the
caller likes.  *Merged* means sorted, disjoint and not even touching: the one canonical form of a
set, which everything here returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vballoon.native import native

if TYPE_CHECKING:
    from numpy.typing import NDArray

    U64 = NDArray[np.uint64]

__all__ = ("blocks", "clip", "coalesce", "expand", "inward", "whole_pages")

_PAGE_MASK, _PAGE_SHIFT = np.uint64(4095), np.uint64(12)


def coalesce(start: U64, end: U64) -> tuple[U64, U64]:
    """The same set of numbers, merged.  Empty ranges vanish; order and overlaps do not matter."""
    if native is None or start.size < 2:
        return _coalesce(start, end)
    low, high = np.empty(start.size, np.uint64), np.empty(start.size, np.uint64)
    start, end = np.ascontiguousarray(start), np.ascontiguousarray(end)
    count = native.merge(start, end, low, high)
    return low[:count], high[:count]


def _coalesce(start: U64, end: U64) -> tuple[U64, U64]:
    """:func:`coalesce` in NumPy."""
    keep = start < end
    if not keep.all():
        start, end = start[keep], end[keep]
    if start.size < 2:
        return start, end
    if not (start[1:] >= start[:-1]).all():
        start, end = _by_start(start, end)
    reach = np.maximum.accumulate(end)
    cut = np.flatnonzero(start[1:] > reach[:-1]) + 1
    return (
        start[np.concatenate(([0], cut))],
        reach[np.concatenate((cut, [start.size])) - 1],
    )


def _by_start(start: U64, end: U64) -> tuple[U64, U64]:
    size = end - start
    if (size == size[0]).all():
        # Ranges of one size (a list of pages): sorting values is several times faster than
        # sorting an order.
        ordered = np.sort(start)
        return ordered, ordered + size[0]
    order = np.argsort(start)
    return start[order], end[order]


def blocks(
    addr: U64, length: NDArray[np.uint32], wanted: NDArray[np.bool_]
) -> tuple[U64, U64, int, int]:
    """The pages of 4 KiB wholly inside those ``[addr, addr + length)`` (bytes) that are *wanted*.

    Returns first and end page numbers, merged; how many pages they are; and how many of the
    ranges were not wanted, or did not begin and end on a page boundary.
    """
    if native is not None:
        start, end = np.empty(addr.size, np.uint64), np.empty(addr.size, np.uint64)
        count, pages, bad = native.blocks(addr, length, wanted, start, end)
        return start[:count], end[:count], pages, bad
    start, end, odd = whole_pages(addr[wanted], length[wanted])
    start, end = coalesce(start, end)
    return start, end, int((end - start).sum()), odd + addr.size - int(np.count_nonzero(wanted))


def whole_pages(addr: U64, length: NDArray[np.uint32]) -> tuple[U64, U64, int]:
    """The pages of 4 KiB wholly inside each ``[addr, addr + length)``, in bytes, both (n,).

    Returns first and end page numbers (uint64[n], half open, possibly empty), and how many of
    the ranges did not begin and end on a page boundary.
    """
    end = addr + length
    odd = int(np.count_nonzero((addr | end) & _PAGE_MASK))
    first = (addr >> _PAGE_SHIFT) + ((addr & _PAGE_MASK) != 0)
    return first, np.maximum(end >> _PAGE_SHIFT, first), odd


def clip(start: U64, end: U64, low: int, high: int) -> tuple[U64, U64]:
    """What of the ranges lies in [*low*, *high*); ranges that do not reach into it vanish."""
    low_, high_ = np.uint64(low), np.uint64(high)
    start, end = np.maximum(start, low_), np.minimum(end, high_)
    keep = start < end
    return start[keep], end[keep]


def inward(start: U64, end: U64, unit: int) -> tuple[U64, U64]:
    """The whole units (multiples of *unit*) inside each range; ranges without one vanish."""
    unit_ = np.uint64(unit)
    if not unit & (unit - 1):
        ragged = (start | end) & np.uint64(unit - 1)
        if not np.count_nonzero(ragged) and (start < end).all():
            return start, end
    remainder = start % unit_
    up = start + np.where(remainder == 0, np.uint64(0), unit_ - remainder)
    down = end - end % unit_
    # Next to 2^64 the rounding up wraps to zero: such a range has no whole unit.
    keep = (up < down) & (up >= start)
    return up[keep], down[keep]


def expand(start: U64, end: U64) -> U64:
    """Every number of the ranges, in the ranges' order (uint64[total])."""
    size = (end - start).astype(np.int64)
    first = np.cumsum(size) - size
    numbers = np.repeat(start, size)
    # Each number counts from its own range's start: the place in the whole, less the range's.
    numbers += np.arange(numbers.size, dtype=np.uint64) - np.repeat(first, size).astype(np.uint64)
    return numbers
