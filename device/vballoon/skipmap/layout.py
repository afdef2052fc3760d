# SPDX-License-Identifier: Apache-2.0
"""The layout of the bitmap: the regions of guest memory in one array of words.

The bitmap of a region begins with the bit of its first page.  A region whose first page number is a
multiple of 64 keeps its alignment.  So a naturally aligned free block is a naturally aligned run of
words in every region.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from vballoon.memory.pages import PAGE_SHIFT
from vballoon.skipmap.bits import WORD_BITS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

__all__ = ("BitmapLayout", "RegionBits", "RegionLike")

ALIGN_WORDS = 512
"""Alignment of bitmaps in words: one page of words, or 128 MiB of guest memory."""


class RegionLike(Protocol):
    """The attributes of a memory region that the layout needs."""

    @property
    def guest_phys_addr(self) -> int:
        """Guest-physical address of the first byte."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def file_offset(self) -> int:
        """Offset in bytes of the region in its backing file."""


@dataclass(frozen=True, slots=True)
class RegionBits:
    """One region of guest memory and the place of its bits."""

    guest_phys_addr: int
    size: int
    file_offset: int
    first_word: int

    @property
    def pages(self) -> int:
        """Number of whole pages; a partial page at the end has no bit and is never skipped."""
        return self.size >> PAGE_SHIFT

    @property
    def words(self) -> int:
        """Number of 64-bit words of this region's bitmap."""
        return -(-self.pages // WORD_BITS)

    @property
    def first_pfn(self) -> int:
        """Page number of the region's first page."""
        return self.guest_phys_addr >> PAGE_SHIFT


class Placed(NamedTuple):
    """Ranges of bits, and the number of requested ranges not entirely in guest memory."""

    start: NDArray[np.uint64]
    end: NDArray[np.uint64]
    clipped: int


class BitmapLayout:
    """The map from regions to bits.  It is immutable; layouts of equal regions are equal."""

    def __init__(self, regions: Iterable[RegionLike]) -> None:
        placed: list[RegionBits] = []
        at = 0
        for region in sorted(regions, key=lambda r: r.guest_phys_addr):
            at += ((region.guest_phys_addr >> PAGE_SHIFT) // WORD_BITS - at) % ALIGN_WORDS
            placed.append(RegionBits(region.guest_phys_addr, region.size, region.file_offset, at))
            at += placed[-1].words
        self.regions = tuple(placed)
        self.words = -(-at // ALIGN_WORDS) * ALIGN_WORDS
        """Number of words of a bitmap, a multiple of a page."""
        self.pages = sum(r.pages for r in placed)
        self._first = np.array([r.first_pfn for r in placed], dtype=np.uint64)
        bit = np.array([r.first_word * WORD_BITS for r in placed], dtype=np.uint64)
        # entry i + 1 belongs to region i, entry 0 to pages before all memory
        self._end = np.array([0, *(r.first_pfn + r.pages for r in placed)], dtype=np.uint64)
        self._shift = np.append(np.uint64(0), bit - self._first)  # modulo 2**64, as sums with it
        self._spans = _spans(placed)
        self.table = np.column_stack((self._first, self._end[1:], self._shift[1:]))
        """uint64[regions, 3]: first page number, end, and what to add for the number of the bit."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BitmapLayout) and self.regions == other.regions

    def __hash__(self) -> int:
        return hash(self.regions)

    def place(self, start: NDArray[np.uint64], end: NDArray[np.uint64]) -> Placed:
        """Return the bits of the pages ``start <= pfn < end`` (uint64[n]), clipped to memory."""
        which = np.searchsorted(self._first, start, side="right")
        if ((start < end) & (end <= self._end.take(which))).all():
            shift = self._shift.take(which)
            return Placed(start + shift, end + shift, 0)
        return self._place_anywhere(start, end)

    def _place_anywhere(self, start: NDArray[np.uint64], end: NDArray[np.uint64]) -> Placed:
        asked = start != end
        inside = np.zeros(start.size, dtype=np.uint64)
        starts, ends = [], []
        for first, last, shift in zip(self._first, self._end[1:], self._shift[1:], strict=True):
            low, high = np.maximum(start, first), np.minimum(end, last)
            here = low < high
            inside += np.where(here, high - low, np.uint64(0))
            starts.append(low[here] + shift)
            ends.append(high[here] + shift)
        clipped = int(np.count_nonzero(asked & (inside != end - start)))
        empty = np.empty(0, dtype=np.uint64)
        return Placed(
            np.concatenate(starts) if starts else empty,
            np.concatenate(ends) if ends else empty,
            clipped,
        )

    def holds(self, start: NDArray[np.uint64], end: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Return which ranges ``start <= pfn < end`` are entirely guest memory (bool[n])."""
        inside = np.zeros(start.shape, np.bool_)
        for first, last in self._spans:
            inside |= (start >= first) & (end <= last)
        return inside

    def of_region(self, words: NDArray[np.uint64], index: int) -> NDArray[np.uint64]:
        """Return a view of the words of region *index* in a whole bitmap *words*."""
        region = self.regions[index]
        return words[region.first_word : region.first_word + region.words]

    def pfns(self, runs: NDArray[np.uint64], index: int) -> NDArray[np.uint64]:
        """Return the page numbers of *runs* of bits, counted from region *index*'s first page."""
        first: np.uint64 = self._first[index]
        return runs + first


def _spans(regions: list[RegionBits]) -> list[tuple[np.uint64, np.uint64]]:
    """Return the first and end page number of each run of adjacent regions."""
    spans: list[tuple[int, int]] = []
    for region in regions:
        first, end = region.first_pfn, region.first_pfn + region.pages
        if spans and spans[-1][1] == first:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((first, end))
    return [(np.uint64(first), np.uint64(end)) for first, end in spans]
