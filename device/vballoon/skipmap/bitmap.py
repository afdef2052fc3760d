# SPDX-License-Identifier: Apache-2.0
"""A bitmap over guest memory as a value: combine, count, list."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vballoon.errors import UsageError
from vballoon.skipmap import bits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from vballoon.skipmap.layout import BitmapLayout

__all__ = ("PageBitmap",)

Spans = list[tuple[int, int]]


class PageBitmap:
    """One bit for each page of guest memory.

    *words* is uint64[layout.words]; *spans* tells which runs of words can be non-zero (default:
    all), so that an untouched bitmap of a huge guest is neither read nor brought into memory.
    """

    def __init__(
        self,
        layout: BitmapLayout,
        words: NDArray[np.uint64] | None = None,
        spans: Callable[[], Spans] | None = None,
    ) -> None:
        self.layout = layout
        self.words = np.zeros(layout.words, dtype=np.uint64) if words is None else words
        if self.words.shape != (layout.words,):
            raise UsageError(f"{self.words.size} words for a bitmap of {layout.words}")
        self._spans = spans

    def spans(self) -> Spans:
        """Runs of words, half open, outside of which all words are zero."""
        return [(0, self.words.size)] if self._spans is None else self._spans()

    def set_ranges(self, start_pfn: NDArray[np.uint64], end_pfn: NDArray[np.uint64]) -> int:
        """Set the bits of ``start <= pfn < end``; returns how many ranges had to be clipped."""
        start, end, clipped = self.layout.place(start_pfn, end_pfn)
        bits.fill(self.words, start, end, True)
        return clipped

    def clear_ranges(self, start_pfn: NDArray[np.uint64], end_pfn: NDArray[np.uint64]) -> int:
        """Clear the bits of ``start <= pfn < end``; returns how many ranges had to be clipped."""
        start, end, clipped = self.layout.place(start_pfn, end_pfn)
        bits.fill(self.words, start, end, False)
        return clipped

    def count(self) -> int:
        """Pages whose bit is set."""
        return sum(bits.count(self.words[a:b]) for a, b in self.spans())

    def extents(self) -> NDArray[np.uint64]:
        """Runs of set bits as page numbers, shape (k, 2), half open, ascending."""
        return _joined([self.region_extents(i) for i in range(len(self.layout.regions))])

    def region_extents(self, index: int) -> NDArray[np.uint64]:
        """The same for region *index* alone."""
        region, found = self.layout.regions[index], []
        for low, high in self.spans():
            low = max(low - region.first_word, 0)
            high = min(high - region.first_word, region.words)
            if low < high:
                runs = bits.extents(self.region(index)[low:high])
                found.append(self.layout.pfns(runs + np.uint64(low * bits.WORD_BITS), index))
        return _joined(found)

    def region(self, index: int) -> NDArray[np.uint64]:
        """The words of one region, bit 0 its first page (a view)."""
        return self.layout.of_region(self.words, index)

    def copy(self) -> PageBitmap:
        """An independent copy; takes memory only for the spans."""
        return combine([self])

    def __or__(self, other: PageBitmap) -> PageBitmap:
        return combine([self, other])

    def __and__(self, other: PageBitmap) -> PageBitmap:
        self._check(other)
        result = self.copy()
        for a, b in result.spans():
            result.words[a:b] &= other.words[a:b]
        return result

    def and_not(self, other: PageBitmap) -> PageBitmap:
        """``self & ~other``: the safety rule's ``bits and not written since``."""
        self._check(other)
        result = self.copy()
        for a, b in result.spans():
            result.words[a:b] &= ~other.words[a:b]
        return result

    def _check(self, other: PageBitmap) -> None:
        if self.layout != other.layout:
            raise UsageError("the bitmaps are of different guest memory")


def combine(bitmaps: Iterable[PageBitmap]) -> PageBitmap:
    """The union of bitmaps of the same guest memory, as a new bitmap."""
    first, *others = bitmaps
    spans = set(first.spans())
    result = PageBitmap(first.layout, spans=lambda: merged)
    for a, b in spans:
        result.words[a:b] = first.words[a:b]
    for other in others:
        first._check(other)
        more = other.spans()
        for a, b in more:
            result.words[a:b] |= other.words[a:b]
        spans.update(more)
    merged = _merge_spans(spans)
    return result


def _merge_spans(spans: Iterable[tuple[int, int]]) -> Spans:
    merged: Spans = []
    for a, b in sorted(spans):
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return merged


def _joined(pieces: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Ascending runs of several pieces, with runs that touch made one."""
    if not pieces:
        return np.empty((0, 2), dtype=np.uint64)
    runs = np.concatenate(pieces)
    apart = runs[1:, 0] != runs[:-1, 1]
    first, last = np.append(True, apart), np.append(apart, True)
    return np.column_stack((runs[first[: len(runs)], 0], runs[last[: len(runs)], 1]))
