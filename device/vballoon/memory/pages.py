# SPDX-License-Identifier: Apache-2.0
"""The size of a page, and functions on columns of ranges; :mod:`.ranges` has them as values.

The ranges are two uint64 arrays ``start``, ``end`` of the same length, half open, in pages or in
bytes.  *Merged* means sorted, disjoint and not even touching: the canonical form of a set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vballoon.native import native

if TYPE_CHECKING:
    from numpy.typing import NDArray

    U64 = NDArray[np.uint64]

__all__ = (
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "clip",
    "coalesce",
    "expand",
    "inward",
    "subtract",
    "whole_pages",
)

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
"""Bytes of a page: the unit of the balloon's page numbers (*Memory Balloon Device*), of every map
and of every log of this package, whatever page size the guest uses."""

_MASK, _SHIFT = np.uint64(PAGE_SIZE - 1), np.uint64(PAGE_SHIFT)


def coalesce(start: U64, end: U64) -> tuple[U64, U64]:
    """Return the same set of numbers, merged.  Order, overlaps and empty ranges do not matter."""
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


def whole_pages(addr: U64, length: NDArray[np.uint32]) -> tuple[U64, U64, int]:
    """Return the pages wholly inside each ``[addr, addr + length)`` (bytes; uint64[n], uint32[n]).

    The result is first and end page numbers (uint64[n], half open, possibly empty), and the number
    of ranges that do not begin and end on a page boundary.
    """
    end = addr + length
    odd = int(np.count_nonzero((addr | end) & _MASK))
    first = (addr >> _SHIFT) + ((addr & _MASK) != 0)
    return first, np.maximum(end >> _SHIFT, first), odd


def clip(start: U64, end: U64, low: int, high: int) -> tuple[U64, U64]:
    """Return the parts of the ranges in [*low*, *high*), without empty ones."""
    low_, high_ = np.uint64(low), np.uint64(high)
    start, end = np.maximum(start, low_), np.minimum(end, high_)
    keep = start < end
    return start[keep], end[keep]


def inward(start: U64, end: U64, unit: int) -> tuple[U64, U64]:
    """Return the whole units (multiples of *unit*) inside each range, without empty ones."""
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
    """Return every number of the ranges, in the order of the ranges (uint64[total])."""
    size = (end - start).astype(np.int64)
    first = np.cumsum(size) - size
    numbers = np.repeat(start, size)
    # Each number counts from its own range's start: the place in the whole, less the range's.
    numbers += np.arange(numbers.size, dtype=np.uint64) - np.repeat(first, size).astype(np.uint64)
    return numbers


def subtract(start: U64, end: U64, out_start: U64, out_end: U64) -> tuple[U64, U64]:
    """Return what of merged ranges is in none of the merged ranges *out*, merged."""
    # A sweep over all borders: +1 inside a range, -1 inside a range that is taken out.
    borders = np.concatenate((start, end, out_start, out_end))
    counts = [start.size, end.size, out_start.size, out_end.size]
    order = np.argsort(borders, kind="stable")
    level = np.cumsum(np.repeat(np.array([1, -1, -1, 1], np.int8), counts)[order])
    borders = borders[order]
    inside = np.flatnonzero(level[:-1] == 1)
    return _coalesce(borders[inside], borders[inside + 1])
