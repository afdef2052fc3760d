# SPDX-License-Identifier: Apache-2.0
"""The compiled inner loops, where they were built; None where they were not.

NumPy needs several passes, each with a call of its own, for what these loops do in one: following
descriptor chains, writing used elements, setting runs of bits, joining page numbers.  They are
optional: whoever uses one has the same in NumPy beside it, takes that where :data:`native` is
None, and tests both.  ``VBALLOON_NATIVE=0`` in the environment turns them off.

What a guest sends is checked in there as it is in NumPy, and never judged: what is not in order
beyond doubt is left to the scalar engine, which names the rule.  They get guest memory as the
mappings themselves (:attr:`GuestMemory.tables <vballoon.memory.table.GuestMemory.tables>`), hold
those that they look into for the length of one call, and keep no address.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Buffer = NDArray[Any]

Tables: TypeAlias = "tuple[Buffer, Buffer, list[Buffer | None]]"
"""Guest memory: regions and spans (uint64[k, 2]: first address, bytes), and for each region its
mapping, or None."""

__all__ = ("Native", "Tables", "native")


class Native(Protocol):
    """The compiled functions.  All columns are contiguous; raises ValueError for ones that do not
    belong together, which is a mistake of the caller's.

    *words* is a bitmap, and *table* (uint64[k, 3]) has first page, end page and what to add for
    the number of the bit.  None, with only some bits done, where the ranges are together larger
    than the bitmap: merge them first.
    """

    def mark_pages(
        self, words: Buffer, table: Buffer, start: Buffer, end: Buffer, value: bool, /
    ) -> int | None:
        """Fill the bits of page ranges (uint64[n]); how many were not wholly in the table."""

    def mark_bytes(
        self, words: Buffer, table: Buffer, addr: Buffer, length: Buffer, /
    ) -> tuple[int, int, int] | None:
        """Set the bits of the whole pages of byte ranges (uint64[n], uint32[n]).

        Returns pages, ranges that do not begin and end on a page, ranges not wholly in the table.
        """

    def mark_records(
        self, words: Buffer, table: Buffer, records: Buffer, least: int, /
    ) -> tuple[int, int] | None:
        """Set the bits of records of first page and pages (uint64[n, 2]).

        Returns pages, and how many records were left out: those that are not made of aligned
        blocks of *least* pages (a power of two), and those not wholly in the table.
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
        """The same of records in guest memory: buffers done, their pages, records left out.

        *counts* (uint64[n]) are those at each *addr* (uint64[n]).  Ends at a buffer that is not in
        one mapping, or that is too much with those before it; some bits of that one may be set.
        """

    def count(self, words: Buffer, /) -> int:
        """Bits set."""

    def unite(self, out: Buffer, /, *words: Buffer) -> None:
        """The union of one or more bitmaps of the size of *out* (uint64[n]), eleven at most."""

    def merge(self, start: Buffer, end: Buffer, out_start: Buffer, out_end: Buffer, /) -> int:
        """Sort and merge ranges (uint64[n]); how many there are then."""

    def blocks(
        self,
        addr: Buffer,
        length: Buffer,
        wanted: Buffer,
        out_start: Buffer,
        out_end: Buffer,
        /,
    ) -> tuple[int, int, int]:
        """The whole pages of byte ranges, merged: how many ranges, pages, and bad ones.

        Bad are those that do not begin and end on a page, and those not *wanted* (bool[n]).
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
        """Merged ranges of guest-physical bytes as ranges of a region's file: how many, bytes.

        *region*: its first address and end, where it starts in the file, and the unit of which
        only whole ones are wanted.
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
        """Read page numbers and merge them: ranges, and numbers outside guest memory.

        *words* (int64[n]): page numbers at each *addr* (uint64[n]).  None: not possible this way.
        """

    def punch(self, fd: int, start: Buffer, end: Buffer, /) -> tuple[int, int]:
        """Free byte ranges (uint64[n]) of a file until one cannot be: how many were, and errno."""

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
        """The leading good buffers of a ring, booked: buffers, elements, descriptors held now.

        *ring*: the heads (None: a packed ring); *where*:
        position, wrap counter, INDIRECT_DESC negotiated; *out*: ids, slots, first, addr, len,
        writable.
        """

    def book_given(self, slots: Buffer, ids: Buffer, out: Buffer, /) -> int:
        """Buffers come back: descriptors that become free, -1 where one was not outstanding."""

    def used_split(self, elements: Buffer, at: int, ids: Buffer, written: Buffer, /) -> None:
        """Used elements of a split ring."""

    def used_packed(
        self, desc: Buffer, at: int, wrap: bool, ids: Buffer, written: Buffer, slots: Buffer, /
    ) -> int:
        """Used descriptors of a packed ring but for the first one's flags, which are returned."""


def _load() -> Native | None:
    if os.environ.get("VBALLOON_NATIVE") == "0":
        return None
    try:
        return cast("Native", importlib.import_module("vballoon.memory._native"))
    except ImportError:
        return None


native: Native | None = _load()
"""The compiled functions, or None."""
