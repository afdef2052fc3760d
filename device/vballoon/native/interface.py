# SPDX-License-Identifier: Apache-2.0
"""The signatures of the compiled functions, one protocol for each user.

All columns are contiguous.  Every function raises ValueError for columns that do not belong
together, which is a mistake of the caller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Buffer = NDArray[Any]

Tables: TypeAlias = "tuple[Buffer, Buffer, list[Buffer | None]]"
"""Guest memory: regions and spans (uint64[k, 2]: first address, bytes), and for each region its
mapping, or None."""

__all__ = ("BitmapLoops", "MemoryLoops", "Native", "RingLoops", "Tables")


class BitmapLoops(Protocol):
    """Loops over the words of a bitmap, for the skip map.

    *words* is a bitmap, and *table* (uint64[k, 3]) has the first page, the end page and what to add
    for the number of the bit.  Functions that set bits return None, with only some bits set, where
    the ranges together are larger than the bitmap: merge them first.
    """

    def mark_pages(
        self, words: Buffer, table: Buffer, start: Buffer, end: Buffer, value: bool, /
    ) -> int | None:
        """Fill the bits of page ranges (uint64[n]).

        Return the number of ranges that were not wholly in the table.
        """

    def mark_bytes(
        self, words: Buffer, table: Buffer, addr: Buffer, length: Buffer, /
    ) -> tuple[int, int, int] | None:
        """Set the bits of the whole pages of byte ranges (uint64[n], uint32[n]).

        Return the pages, the ranges that do not begin and end on a page, and the ranges
        not wholly in the table.
        """

    def mark_records(
        self, words: Buffer, table: Buffer, records: Buffer, least: int, /
    ) -> tuple[int, int] | None:
        """Set the bits of records of first page and pages (uint64[n, 2]).

        Return the pages, and the number of records left out: records that are not made of
        aligned blocks of *least* pages (a power of two), and records not wholly in the table.
        """

    def mark_guest_records(
        self,
        words: Buffer,
        table: Buffer,
        memory: Tables,
        addr: Buffer,
        counts: Buffer,
        least: int,
        /,
    ) -> tuple[int, int, int]:
        """Set the bits of records that are read from guest memory.

        *counts* (uint64[n]) records are at each *addr* (uint64[n]).  Return the number of buffers
        done, their pages, and the records left out.  Stop at a buffer that is not in one mapping,
        or that is too much together with those before it; some bits of that one may be set.
        """

    def count(self, words: Buffer, /) -> int:
        """Return the number of bits set."""

    def unite(self, out: Buffer, /, *words: Buffer) -> None:
        """Write the union of 1 to 11 bitmaps of the size of *out* (uint64[n]) to *out*."""


class MemoryLoops(Protocol):
    """Loops over ranges of guest memory, for the room ``memory``."""

    def merge(self, start: Buffer, end: Buffer, out_start: Buffer, out_end: Buffer, /) -> int:
        """Sort and merge ranges (uint64[n]).  Return the number of ranges left."""

    def blocks(
        self,
        addr: Buffer,
        length: Buffer,
        wanted: Buffer,
        out_start: Buffer,
        out_end: Buffer,
        /,
    ) -> tuple[int, int, int]:
        """Write the whole pages of byte ranges as merged page ranges.

        Return the number of ranges, pages and bad ranges.  Bad ranges do not begin and end on a
        page, or are not *wanted* (bool[n]).
        """

    def in_file(
        self,
        start: Buffer,
        end: Buffer,
        out_start: Buffer,
        out_end: Buffer,
        region: tuple[int, int, int, int],
        /,
    ) -> tuple[int, int]:
        """Translate merged ranges of guest-physical bytes to ranges of a region's file.

        *region* is its first address and end, where it starts in the file, and the unit of which
        only whole ones are kept, all in bytes.  Return the number of ranges and their bytes.
        """

    def page_runs(
        self,
        memory: Tables,
        addr: Buffer,
        words: Buffer,
        out_start: Buffer,
        out_end: Buffer,
        /,
    ) -> tuple[int, int] | None:
        """Read page numbers from guest memory and merge them to page ranges.

        *words* (int64[n]) numbers are at each *addr* (uint64[n]).  Return the number of ranges and
        of page numbers outside guest memory; None where the buffers cannot be read in this way.
        """

    def punch(self, fd: int, start: Buffer, end: Buffer, /) -> tuple[int, int]:
        """Free byte ranges (uint64[n]) of a file until one cannot be freed.

        Return the number of ranges freed and errno (0: none failed).
        """


class RingLoops(Protocol):
    """Loops over descriptors of a ring, for the batch engines of ``virtqueue``."""

    def take_run(
        self,
        memory: Tables,
        desc: Buffer,
        ring: Buffer | None,
        where: tuple[int, bool, bool],
        slots: Buffer,
        out: tuple[Buffer, ...],
        limit: int,
        held: int,
        /,
    ) -> tuple[int, int, int]:
        """Take the leading valid buffers of a ring and book them.

        *ring* has the heads (None: a packed ring); *where* is the position, the wrap counter and
        whether INDIRECT_DESC is negotiated; *out* takes ids, slots, first, addr, len, writable.
        Return the number of buffers, elements, and descriptors held from now on.
        """

    def book_given(self, slots: Buffer, ids: Buffer, out: Buffer, /) -> int:
        """Book buffers as given back.

        Return the number of descriptors that become free; -1 where one was not outstanding.
        """

    def used_split(self, elements: Buffer, at: int, ids: Buffer, written: Buffer, /) -> None:
        """Write used elements of a split ring."""

    def used_packed(
        self, desc: Buffer, at: int, wrap: bool, ids: Buffer, written: Buffer, slots: Buffer, /
    ) -> int:
        """Write used descriptors of a packed ring, except the flags of the first.

        Return the flags of the first, which make all of them visible to the driver.
        """


class Native(BitmapLoops, MemoryLoops, RingLoops, Protocol):
    """All functions of the extension module."""
