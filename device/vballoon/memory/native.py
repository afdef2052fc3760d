# SPDX-License-Identifier: Apache-2.0
"""The compiled inner loops, where they were built; None where they were not.

NumPy needs several passes, each with a call of its own, for what these loops do in one: following
descriptor chains, writing used elements, setting runs of bits, joining page numbers.  They are
optional, and for the time being used only where ``VBALLOON_NATIVE=1`` is in the environment: they
work on addresses, and it has still to be shown that no table of addresses outlives its mapping.
Whoever uses one has the same in NumPy beside it, takes that where :data:`native` is None, and
tests both.

What a guest sends is checked in there as it is in NumPy, and never judged: what is not in order
beyond doubt is left to the scalar engine, which names the rule.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Buffer = NDArray[Any]

__all__ = ("BYTES", "COUNTED", "PAGES", "Native", "native")

PAGES, COUNTED, BYTES = 0, 1, 2
"""What the two columns of :meth:`Native.mark` are: first and end page (uint64), first page and
how many (uint64), guest-physical address (uint64) and bytes (uint32)."""


class Native(Protocol):
    """The compiled functions.  All columns are contiguous; raises ValueError for ones that do not
    belong together, which is a mistake of the caller's."""

    def mark(
        self,
        words: Buffer,
        table: Buffer,
        a: Buffer,
        b: Buffer,
        strides: tuple[int, int],
        n: int,
        kind: int,
        value: bool,
        least: int,
        /,
    ) -> tuple[int, int, int] | None:
        """Fill the bits of *n* page ranges: their pages, odd ones, clipped ones.

        *table* (uint64[k, 3]) has first page, end page and what to add for the bit's number.
        Odd are BYTES that do not begin and end on a page, and COUNTED ranges of fewer than
        *least* pages or not wholly in the table, which are left out.  None, with only some done,
        where the ranges are together larger than the bitmap: merge them first.
        """

    def count(self, words: Buffer, /) -> int:
        """Bits set."""

    def merge(self, start: Buffer, end: Buffer, out_start: Buffer, out_end: Buffer, /) -> int:
        """Merge ranges (uint64[n]) by ascending start; how many, -1 where they do not ascend."""

    def page_runs(
        self,
        regions: Buffer,
        spans: Buffer,
        addr: Buffer,
        words: Buffer,
        out_start: Buffer,
        out_end: Buffer,
        /,
    ) -> tuple[int, int] | None:
        """Read page numbers and join neighbours: runs, and numbers outside guest memory.

        *regions* (uint64[k, 3]): address, bytes, where mapped; *spans* (uint64[k, 2]): address,
        bytes; *words* (int64[n]): page numbers at each of *addr*.  None: not possible this way.
        """

    def punch(self, fd: int, start: Buffer, end: Buffer, /) -> tuple[int, int]:
        """Free byte ranges (uint64[n]) of a file until one cannot be: how many were, and errno."""

    def take_run(
        self,
        memory: tuple[Buffer, Buffer],
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

        *memory*: regions and spans, as above; *ring*: the heads (None: a packed ring); *where*:
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
    if os.environ.get("VBALLOON_NATIVE") != "1":
        return None
    try:
        return cast("Native", importlib.import_module("vballoon.memory._native"))
    except ImportError:
        return None


native: Native | None = _load()
"""The compiled functions, or None."""
