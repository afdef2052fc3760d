# SPDX-License-Identifier: Apache-2.0
"""Sets of page numbers and of byte addresses: :class:`PageRanges` and :class:`ByteRanges`.

Both are values: sorted, disjoint, not even touching, and never changed after they are made.  The
unit is in the type, so the two cannot be mixed up, and a set that has been merged once is not
merged again by whoever takes it.  The columns are NumPy arrays, because a report of a busy guest
has thousands of ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from vballoon.memory.pages import (
    PAGE_SHIFT,
    clip,
    coalesce,
    expand,
    inward,
    subtract,
    whole_pages,
)
from vballoon.native import native

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import ArrayLike, NDArray

    U64 = NDArray[np.uint64]

__all__ = ("ByteRanges", "PageRanges", "blocks")

_SHIFT = np.uint64(PAGE_SHIFT)
_BELOW = np.uint64((1 << PAGE_SHIFT) - 1)


@dataclass(frozen=True, slots=True, eq=False, init=False, repr=False)
class _Ranges:
    """Half-open ranges ``start <= n < end`` (uint64[k] each), merged and ascending."""

    start: U64
    end: U64
    _total: int

    def __init__(self, start: ArrayLike = (), end: ArrayLike = ()) -> None:
        first, last = np.asarray(start, np.uint64), np.asarray(end, np.uint64)
        if first.ndim != 1 or first.shape != last.shape:
            raise ValueError(f"columns of different shapes: {first.shape}, {last.shape}")
        low, high = coalesce(first, last)
        if low is first:  # nothing to merge: the caller keeps its own columns
            low, high = low.copy(), high.copy()
        self._hold(low, high, -1)

    def _hold(self, start: U64, end: U64, total: int) -> None:
        start.flags.writeable = end.flags.writeable = False
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "end", end)
        object.__setattr__(self, "_total", total)

    @classmethod
    def merged(cls, start: U64, end: U64, total: int = -1) -> Self:
        """Return the ranges of columns that are merged already, which is not checked.

        The columns (uint64[k]) must not be used elsewhere; they become read-only.  *total* is what
        :attr:`total` would compute, where that is known.
        """
        ranges = cls.__new__(cls)
        ranges._hold(start, end, total)
        return ranges

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> Self:
        """Return the set of *pairs* ``(start, end)``, in any order; they may overlap."""
        rows = np.array(list(pairs), np.uint64).reshape(-1, 2)
        return cls(rows[:, 0], rows[:, 1])

    @property
    def total(self) -> int:
        """How many numbers are in the set."""
        if self._total < 0:
            object.__setattr__(self, "_total", int((self.end - self.start).sum()))
        return self._total

    def clip(self, low: int, high: int) -> Self:
        """Return the part in [*low*, *high*)."""
        if not len(self) or (int(self.start[0]) >= low and int(self.end[-1]) <= high):
            return self
        return self.merged(*clip(self.start, self.end, low, high))

    def whole(self, unit: int) -> Self:
        """Return the whole units (multiples of *unit*) inside each range."""
        start, end = inward(self.start, self.end, unit)
        # Two ranges with less than a unit between them can become neighbours that touch.
        return self.merged(start, end) if start is self.start else type(self)(start, end)

    def moved(self, distance: int) -> Self:
        """Return every number plus *distance* (which may be negative), modulo 2^64."""
        if not distance:
            return self
        by = np.uint64(distance & 0xFFFF_FFFF_FFFF_FFFF)
        return self.merged(self.start + by, self.end + by, self._total)

    def numbers(self) -> U64:
        """Return every number of the set, ascending (uint64[total])."""
        return expand(self.start, self.end)

    def rows(self) -> U64:
        """Return the ranges as rows of start and end (uint64[k, 2])."""
        return np.column_stack((self.start, self.end))

    def tolist(self) -> list[list[int]]:
        """Return the ranges as a list of ``[start, end]``."""
        return [[start, end] for start, end in self]

    def __or__(self, other: Self) -> Self:
        """Return what is in either."""
        if not len(self) or not len(other):
            return self if len(self) else other
        start = np.concatenate((self.start, other.start))
        return type(self)(start, np.concatenate((self.end, other.end)))

    def __sub__(self, other: Self) -> Self:
        """Return what is in this set and not in *other*."""
        if not len(self) or not len(other):
            return self
        return self.merged(*subtract(self.start, self.end, other.start, other.end))

    def __and__(self, other: Self) -> Self:
        """Return what is in both."""
        return self - (self - other)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.start.tolist(), self.end.tolist(), strict=True)

    def __len__(self) -> int:
        return self.start.size

    def __eq__(self, other: object) -> bool:
        return (
            type(other) is type(self)
            and isinstance(other, _Ranges)
            and np.array_equal(self.start, other.start)
            and np.array_equal(self.end, other.end)
        )

    def __hash__(self) -> int:
        return hash((type(self), self.start.tobytes(), self.end.tobytes()))

    def __repr__(self) -> str:
        shown = ", ".join(f"{a:#x}-{b:#x}" for a, b in list(self)[:4])
        return f"<{type(self).__name__} {shown}{', ...' if len(self) > 4 else ''}>"


class PageRanges(_Ranges):
    """A set of page numbers; a page has 4096 bytes (:data:`~vballoon.memory.pages.PAGE_SIZE`)."""

    __slots__ = ()

    def bytes(self) -> ByteRanges:
        """Return the addresses of all bytes in the pages.

        Numbers must be below 2^52: every page of guest memory is.
        """
        total = self._total << PAGE_SHIFT if self._total >= 0 else -1
        return ByteRanges.merged(self.start << _SHIFT, self.end << _SHIFT, total)


class ByteRanges(_Ranges):
    """A set of bytes by address or by position in a file."""

    __slots__ = ()

    def pages(self) -> PageRanges:
        """Return the pages that lie wholly in the set."""
        inside = self.whole(1 << PAGE_SHIFT)
        return PageRanges.merged(inside.start >> _SHIFT, inside.end >> _SHIFT)

    def touched_pages(self) -> PageRanges:
        """Return the pages of which at least one byte is in the set."""
        last = (self.end - np.uint64(1)) >> _SHIFT
        return PageRanges(self.start >> _SHIFT, last + np.uint64(1))


def blocks(
    addr: U64, length: NDArray[np.uint32], wanted: NDArray[np.bool_]
) -> tuple[PageRanges, int]:
    """Return the pages wholly inside those ``[addr, addr + length)`` (bytes) that are *wanted*.

    *addr* is uint64[n], *length* uint32[n], *wanted* bool[n].  Return as well the number of ranges
    that were not wanted, or that do not begin and end on a page boundary.
    """
    if native is not None:
        start, end = np.empty(addr.size, np.uint64), np.empty(addr.size, np.uint64)
        count, pages, bad = native.blocks(addr, length, wanted, start, end)
        return PageRanges.merged(start[:count], end[:count], pages), bad
    start, end, odd = whole_pages(addr[wanted], length[wanted])
    return PageRanges(start, end), odd + addr.size - int(np.count_nonzero(wanted))
