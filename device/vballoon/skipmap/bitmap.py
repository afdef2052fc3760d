# SPDX-License-Identifier: Apache-2.0
"""A bitmap of guest memory as a value, with operations to combine, count and list."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

import numpy as np

from vballoon.errors import UsageError
from vballoon.memory.pages import whole_pages
from vballoon.memory.ranges import PageRanges
from vballoon.native import native
from vballoon.skipmap import bits
from vballoon.skipmap.records import checked_ranges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from numpy.typing import NDArray

    from vballoon.memory import GuestMemory
    from vballoon.skipmap.layout import BitmapLayout

__all__ = ("PageBitmap",)

Spans = list[tuple[int, int]]
CHUNK = 1 << 15
"""Number of words combined at a time: 256 KiB, which stay in the cache between bitmaps."""
COMPILED_CHUNK = 1 << 20
"""The same number if one pass reads all bitmaps, which do not fit into the caches."""


class PageBitmap:
    """One bit for each page of guest memory.

    *words* is uint64[layout.words]; *spans* are the runs of words that can be non-zero (default:
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
        """Half-open runs of words; all other words are zero."""
        return [(0, self.words.size)] if self._spans is None else self._spans()

    def set_ranges(self, pages: PageRanges) -> int:
        """Set the bits of *pages*.  Return the number of ranges not entirely in guest memory."""
        return self._fill(pages.start, pages.end, True)

    def clear_ranges(self, pages: PageRanges) -> int:
        """Clear the bits of *pages*.  Return the number of ranges not entirely in guest memory."""
        return self._fill(pages.start, pages.end, False)

    def set_bytes(
        self, addr: NDArray[np.uint64], length: NDArray[np.uint32]
    ) -> tuple[int, int, int]:
        """Set the bits of the whole pages in each ``[addr, addr + length)``, contiguous columns.

        Return the number of pages, of ranges not aligned to pages, and of clipped ranges.
        """
        if native is not None:
            done = native.mark_bytes(self.words, self.layout.table, addr, length)
            if done is not None:
                return done
        start, end, odd = whole_pages(addr, length)
        return int((end - start).sum()), odd, self._fill(start, end, True)

    def set_records(self, records: NDArray[Any], least: int) -> tuple[int, int]:
        """Set the bits of *records* (``WalkRange``) that are entirely guest memory.

        Return their pages and the number of ignored records: those outside guest memory, and those
        that do not consist of aligned blocks of *least* pages (a power of two).
        """
        if native is not None:
            done = native.mark_records(self.words, self.layout.table, records, least)
            if done is not None:
                return done
        start, end, bad = checked_ranges(self.layout, records, least)
        self._fill(start, end, True)
        return int((end - start).sum()), bad

    def set_guest_records(
        self, memory: GuestMemory, addr: NDArray[np.uint64], counts: NDArray[np.int64], least: int
    ) -> tuple[int, int, int]:
        """Set the bits of records in guest memory, if that is possible in one pass.

        *counts* (int64[n]) records are at each *addr* (uint64[n], bytes).  Each field is read
        once.  Return the number of leading buffers that were handled (possibly 0), their pages,
        and the number of ignored records.
        """
        if native is None:
            return 0, 0, 0
        return native.mark_guest_records(
            self.words, self.layout.table, memory.tables, addr, counts, least
        )

    def _fill(self, start_pfn: NDArray[np.uint64], end_pfn: NDArray[np.uint64], value: bool) -> int:
        if native is not None:
            start, end = np.ascontiguousarray(start_pfn), np.ascontiguousarray(end_pfn)
            done = native.mark_pages(self.words, self.layout.table, start, end, value)
            if done is not None:
                return done
        start, end, clipped = self.layout.place(start_pfn, end_pfn)
        bits.fill(self.words, start, end, value)
        return clipped

    def count(self) -> int:
        """Return the number of pages whose bit is set."""
        return sum(bits.count(self.words[a:b]) for a, b in self.spans())

    def extents(self) -> PageRanges:
        """Return the pages whose bit is set."""
        return _joined([self._region_runs(i) for i in range(len(self.layout.regions))])

    def region_extents(self, index: int) -> PageRanges:
        """Return the pages of region *index* whose bit is set."""
        return _joined([self._region_runs(index)])

    def _region_runs(self, index: int) -> NDArray[np.uint64]:
        region, found = self.layout.regions[index], []
        for low, high in self.spans():
            low = max(low - region.first_word, 0)
            high = min(high - region.first_word, region.words)
            if low < high:
                runs = bits.extents(self.region(index)[low:high])
                found.append(self.layout.pfns(runs + np.uint64(low * bits.WORD_BITS), index))
        return np.concatenate(found) if found else np.empty((0, 2), np.uint64)

    def region(self, index: int) -> NDArray[np.uint64]:
        """Return a view of the words of one region; bit 0 is its first page."""
        return self.layout.of_region(self.words, index)

    def copy(self) -> PageBitmap:
        """Return an independent copy, which uses memory only for the spans."""
        return combine([self])

    def __or__(self, other: PageBitmap) -> PageBitmap:
        return combine([self, other])

    def __and__(self, other: PageBitmap) -> PageBitmap:
        return self._masked(other, inverted=False)

    def and_not(self, other: PageBitmap) -> PageBitmap:
        """Return ``self & ~other``, the safety rule's ``bits and not written since``."""
        return self._masked(other, inverted=True)

    def _masked(self, other: PageBitmap, *, inverted: bool) -> PageBitmap:
        self._check(other)
        spans = self.spans()
        result = PageBitmap(self.layout, spans=lambda: spans)
        mask = np.empty(CHUNK, dtype=np.uint64)
        for a, b in _chunks(spans):
            words = other.words[a:b]
            if inverted:
                words = np.invert(words, out=mask[: b - a])
            np.bitwise_and(self.words[a:b], words, out=result.words[a:b])
        return result

    def _check(self, other: PageBitmap) -> None:
        if self.layout != other.layout:
            raise UsageError("the bitmaps are of different guest memory")


def combine(bitmaps: Iterable[PageBitmap], into: PageBitmap | None = None) -> PageBitmap:
    """Return the union of bitmaps of the same guest memory, as a new bitmap.

    *into*, an earlier result, is overwritten instead of allocating memory, which takes most of the
    time for a huge guest.
    """
    first, *others = bitmaps
    for other in others:
        first._check(other)
    spans = [bitmap.spans() for bitmap in (first, *others)]
    merged = _merge_spans(span for each in spans for span in each)
    result = _result(first, merged, into)
    inputs = [
        _pieces(bitmap.words, each)
        for bitmap, each in zip((first, *others), spans, strict=True)
        if each
    ]
    for a, b in _chunks(merged, CHUNK if native is None else COMPILED_CHUNK):
        # all bitmaps one chunk at a time, so that the result stays in the cache
        _unite(
            result.words[a:b],
            [(start - a, words) for pieces in inputs for start, words in pieces(a, b)],
            clear=into is not None,
        )
    return result


def _unite(
    out: NDArray[np.uint64], pieces: list[tuple[int, NDArray[np.uint64]]], *, clear: bool
) -> None:
    """Write the union of *pieces* (start in *out*, words) to *out*."""
    whole = [words for _, words in pieces if words.size == out.size]
    parts = [(start, words) for start, words in pieces if words.size != out.size]
    if whole and native is not None:
        native.unite(out, *whole)
    elif len(whole) > 1:
        np.bitwise_or(whole[0], whole[1], out=out)
        for words in whole[2:]:
            np.bitwise_or(out, words, out=out)
    elif whole:
        out[:] = whole[0]
    elif clear:
        out[:] = 0
    for start, words in parts:
        out[start : start + words.size] |= words


def _result(like: PageBitmap, spans: Spans, into: PageBitmap | None) -> PageBitmap:
    """Return an array for a result with these *spans*; all other words are zero."""
    if into is None:
        return PageBitmap(like.layout, spans=lambda: spans)
    like._check(into)
    former = into.spans()
    if former != spans:
        for a, b in former:
            into.words[a:b] = 0
    return PageBitmap(like.layout, into.words, spans=lambda: spans)


def _chunks(spans: Spans, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Yield *spans* split into pieces of at most *size* words."""
    for low, high in spans:
        for at in range(low, high, size):
            yield at, min(at + size, high)


def _pieces(
    words: NDArray[np.uint64], spans: Spans
) -> Callable[[int, int], Iterator[tuple[int, NDArray[np.uint64]]]]:
    """Return a function that yields the parts of *words* in [a, b) inside *spans*, with start."""
    ends = [high for _, high in spans]

    def within(a: int, b: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        for i in range(bisect_right(ends, a), len(spans)):
            low, high = max(spans[i][0], a), min(spans[i][1], b)
            if low >= high:
                return
            yield low, words[low:high]

    return within


def _merge_spans(spans: Iterable[tuple[int, int]]) -> Spans:
    merged: Spans = []
    for a, b in sorted(spans):
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return merged


def _joined(pieces: list[NDArray[np.uint64]]) -> PageRanges:
    """Return the ranges of ascending runs (uint64[k, 2]) of several pieces; runs may touch."""
    if not pieces:
        return PageRanges()
    runs = np.concatenate(pieces)
    return PageRanges(runs[:, 0], runs[:, 1])
