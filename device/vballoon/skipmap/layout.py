# SPDX-License-Identifier: Apache-2.0
"""Where the bit of a guest page lies: guest memory's regions laid out in one run of words.

Every region's bitmap begins with the bit of its first page.  Regions are placed so that a region
whose first page number is a multiple of 64 keeps its alignment: a naturally aligned free block is
then a naturally aligned run of words, whatever region it is in.
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
"""Bitmaps keep their alignment modulo one page of words (128 MiB of guest memory)."""


class RegionLike(Protocol):
    """What the layout needs of a memory region."""

    @property
    def guest_phys_addr(self) -> int:
        """First byte, guest-physical."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def file_offset(self) -> int:
        """Where the region starts in its backing file, bytes."""


@dataclass(frozen=True, slots=True)
class RegionBits:
    """One region of guest memory, and where its bits are."""

    guest_phys_addr: int
    size: int
    file_offset: int
    first_word: int

    @property
    def pages(self) -> int:
        """Whole pages; a partial one at the end has no bit, so it is never skipped."""
        return self.size >> PAGE_SHIFT

    @property
    def words(self) -> int:
        """64-bit words of this region's bitmap."""
        return -(-self.pages // WORD_BITS)

    @property
    def first_pfn(self) -> int:
        """Page number of the region's first page."""
        return self.guest_phys_addr >> PAGE_SHIFT


class Placed(NamedTuple):
    """Ranges of bits, and how many of the ranges asked for were not wholly in guest memory."""

    start: NDArray[np.uint64]
    end: NDArray[np.uint64]
    clipped: int


class BitmapLayout:
    """Regions → bits.  Immutable; equal when the regions are the same."""

    def __init__(self, regions: Iterable[RegionLike]) -> None:
        placed: list[RegionBits] = []
        at = 0
        for region in sorted(regions, key=lambda r: r.guest_phys_addr):
            at += ((region.guest_phys_addr >> PAGE_SHIFT) // WORD_BITS - at) % ALIGN_WORDS
            placed.append(RegionBits(region.guest_phys_addr, region.size, region.file_offset, at))
            at += placed[-1].words
        self.regions = tuple(placed)
        self.words = -(-at // ALIGN_WORDS) * ALIGN_WORDS
        """Words of one whole bitmap, a multiple of a page of them."""
        self.pages = sum(r.pages for r in placed)
        self._first = np.array([r.first_pfn for r in placed], dtype=np.uint64)
        bit = np.array([r.first_word * WORD_BITS for r in placed], dtype=np.uint64)
        # entry i + 1 is region i's, entry 0 that of pages before all memory
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
        """Bits of the pages ``start <= pfn < end`` (uint64[n]); what is not memory is cut off."""
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
        """Which ranges ``start <= pfn < end`` (start < end) are wholly guest memory (bool[n])."""
        inside = np.zeros(start.shape, np.bool_)
        for first, last in self._spans:
            inside |= (start >= first) & (end <= last)
        return inside

    def of_region(self, words: NDArray[np.uint64], index: int) -> NDArray[np.uint64]:
        """The words of region *index* in a whole bitmap *words* (a view)."""
        region = self.regions[index]
        return words[region.first_word : region.first_word + region.words]

    def pfns(self, runs: NDArray[np.uint64], index: int) -> NDArray[np.uint64]:
        """Page numbers of *runs* of bits that count from region *index*'s first page."""
        first: np.uint64 = self._first[index]
        return runs + first


def _spans(regions: list[RegionBits]) -> list[tuple[np.uint64, np.uint64]]:
    """First and end page number of each run of regions without a gap."""
    spans: list[tuple[int, int]] = []
    for region in regions:
        first, end = region.first_pfn, region.first_pfn + region.pages
        if spans and spans[-1][1] == first:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((first, end))
    return [(np.uint64(first), np.uint64(end)) for first, end in spans]
