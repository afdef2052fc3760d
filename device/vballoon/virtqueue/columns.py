# SPDX-License-Identifier: Apache-2.0
"""Descriptors of many chains as columns, collected and checked together.

The batch engines never name a rule.  They find out how many leading chains are certainly valid; the
scalar engine decides about the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from vballoon.memory.records import RECORD, reachable, read_records
from vballoon.virtqueue.base import ChainBatch
from vballoon.virtqueue.chain import CHAIN_BYTES_MAX

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vballoon.memory import GuestMemory

    Rows = NDArray[np.uint64]

__all__ = ("Columns", "Part", "Tables", "all_like_first", "lengths_of", "word16")

_T = TypeVar("_T", bound=np.generic)


def all_like_first(values: NDArray[np.uint16]) -> bool:
    """Return whether every entry of *values* is equal to the first one."""
    return bool(np.count_nonzero(values == values[0]) == values.size)


def lengths_of(rows: Rows) -> NDArray[np.uint32]:
    """Return a copy of ``len`` of raw descriptors (uint64[n, 2]) in either format."""
    return rows.view(np.uint32)[:, 2].copy()


def word16(rows: Rows, word: int) -> NDArray[np.uint16]:
    """Return a 16-bit *word* of raw descriptors (``flags``: 6 in split, 7 in packed ones)."""
    return rows.view(np.uint16)[:, word]


@dataclass(slots=True)
class Part:
    """Elements of several chains; the elements of a chain are in order, also across parts."""

    chain: NDArray[np.intp]
    addr: NDArray[np.uint64]
    len: NDArray[np.uint32]
    writable: NDArray[np.bool_]


@dataclass(slots=True)
class Tables:
    """Indirect tables, at most one for each chain."""

    chain: NDArray[np.intp]
    addr: NDArray[np.uint64]
    len: NDArray[np.uint64]

    def first_bad(self, memory: GuestMemory, size: int, budget: int) -> int | None:
        """Return the first chain whose table is not plain or exceeds *budget* descriptors.

        Sort the tables by chain.  A plain table has whole descriptors, at most the queue size, in
        one mapped region.
        """
        order = np.argsort(self.chain, kind="stable")
        self.chain, self.addr, self.len = self.chain[order], self.addr[order], self.len[order]
        bad = (self.len % RECORD != 0) | (self.len == 0) | (self.len > RECORD * size)
        bad |= ~reachable(memory, self.addr, self.len)
        bad |= np.cumsum(self.len) > RECORD * budget
        return int(self.chain[np.argmax(bad)]) if bad.any() else None

    def cut(self, end: int) -> None:
        """Drop the tables of chains from *end* on."""
        keep = self.chain < end
        self.chain, self.addr, self.len = self.chain[keep], self.addr[keep], self.len[keep]

    def read(
        self, memory: GuestMemory
    ) -> tuple[NDArray[np.intp], Rows, NDArray[np.intp], NDArray[np.intp]]:
        """Return every entry of every table in four columns.

        The columns are the chain, the bytes, the index in the table, and the number of entries
        that follow.
        """
        count = (self.len // np.uint64(RECORD)).astype(np.intp)
        rows = read_records(memory, self.addr, count)
        end = np.cumsum(count)
        place = np.arange(rows.shape[0])
        index = place - np.repeat(end - count, count)
        return np.repeat(self.chain, count), rows, index, np.repeat(end - 1, count) - place


class Columns:
    """The parts of a batch of *count* chains."""

    def __init__(self, count: int, parts: list[Part]) -> None:
        self.chain = _join([p.chain for p in parts])
        self.addr = _join([p.addr for p in parts])
        self.len = _join([p.len for p in parts])
        self.writable = _join([p.writable for p in parts])
        keep = self.chain < count
        if not keep.all():
            self._pick(keep)
        if len(parts) > 1:
            self._pick(np.argsort(self.chain, kind="stable"))
        self.first = np.zeros(count + 1, np.intp)
        np.cumsum(np.bincount(self.chain, minlength=count), out=self.first[1:])

    def _pick(self, which: NDArray[np.bool_] | NDArray[np.intp]) -> None:
        self.chain, self.addr = self.chain[which], self.addr[which]
        self.len, self.writable = self.len[which], self.writable[which]

    def good(self, memory: GuestMemory, size: int) -> int:
        """Return the number of leading chains whose elements break no rule."""
        bad = ~memory.contains(self.addr, self.len)
        # A readable element after a writable one of the same chain.
        bad[1:] |= self.writable[:-1] & ~self.writable[1:] & (self.chain[1:] == self.chain[:-1])
        count = self.first.size - 1
        total = np.zeros(self.len.size + 1, np.uint64)
        np.cumsum(self.len, out=total[1:])
        wrong = (total[self.first[1:]] - total[self.first[:-1]]) > CHAIN_BYTES_MAX
        wrong |= np.diff(self.first) > size
        wrong[self.chain[bad]] = True
        return int(np.argmax(wrong)) if wrong.any() else count

    def batch(self, memory: GuestMemory, ids: NDArray[np.uint16]) -> ChainBatch:
        """Return the first ``ids.size`` chains as a batch."""
        end = int(self.first[ids.size])
        return ChainBatch(
            ids=ids,
            first=self.first[: ids.size + 1],
            addr=self.addr[:end],
            len=self.len[:end],
            writable=self.writable[:end],
            memory=memory,
        )


def _join(arrays: list[NDArray[_T]]) -> NDArray[_T]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
