# SPDX-License-Identifier: Apache-2.0
"""What both batch engines add to a ring: many buffers in one step, and the scalar way out.

A step takes the leading run of buffers that are in order beyond doubt.  Where that run is empty,
a few buffers go through the scalar engine, which takes them or names the broken rule.  After such
a detour the next step looks at few buffers, and at four times as many with each success, so that
a guest which makes every buffer odd costs what the scalar engine costs and no more.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from vballoon.virtqueue.base import ChainBatch, empty_batch
from vballoon.virtqueue.columns import lengths_of
from vballoon.virtqueue.ring import Ring

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("FEW", "Batching")

FEW = 8
"""Buffers (or chains still being followed) below which array operations do not pay."""


class Batching(Ring):
    """The batch half of an engine; goes in front of the scalar class of its format."""

    _window: int
    _ones: NDArray[np.uint16]
    _count_up: NDArray[np.intp]
    _constant: dict[bool, NDArray[np.bool_]]

    def _prepare(self) -> None:
        """Columns that most batches have in common; batches get slices of them, read-only."""
        self._window = self.size
        self._ones = np.ones(self.size, np.uint16)
        self._count_up = np.arange(self.size + 1)
        self._constant = {value: np.full(self.size, value) for value in (False, True)}
        self._ones.flags.writeable = self._count_up.flags.writeable = False
        for column in self._constant.values():
            column.flags.writeable = False

    def _singles(
        self, ids: NDArray[np.uint16], rows: NDArray[np.uint64], write: NDArray[np.bool_]
    ) -> ChainBatch:
        """The leading good buffers of those that have one descriptor each.

        *rows* are the raw descriptors, *write* says which of them are device-writable.
        """
        addr, length = rows[:, 0].copy(), lengths_of(rows)
        inside = self._memory.contains(addr, length)
        good = ids.size
        if np.count_nonzero(inside) != good:
            good = int(inside.argmin())
        writable = np.count_nonzero(write)
        if writable in (0, ids.size):
            column = self._constant[bool(writable)][:good]
        else:
            column = write[:good]
        return ChainBatch(
            ids=ids[:good],
            first=self._count_up[: good + 1],
            addr=addr[:good],
            len=length[:good],
            writable=column,
            memory=self._memory,
        )

    def _usable(self, ids: NDArray[np.intp]) -> int:
        """How many ids, from the first on, are not outstanding and not there twice."""
        taken = self._slots.take(ids)
        if np.count_nonzero(taken):
            ids = ids[: int(np.argmax(taken != 0))]
        if not self._distinct(ids):
            _, first = np.unique(ids, return_index=True)
            again = np.ones(ids.size, np.bool_)
            again[first] = False
            ids = ids[: int(np.argmax(again))]
        return ids.size

    def _take_part(self, limit: int) -> ChainBatch:
        part = self._take_run(min(limit, self._window))
        if part is None:
            return empty_batch(self._memory)
        if len(part):
            self._window = min(4 * self._window, self.size)
            return part
        self._window = 4 * FEW
        return self._take_walking(min(limit, FEW))

    @abstractmethod
    def _take_run(self, limit: int) -> ChainBatch | None:
        """The leading good run, booked (perhaps empty); None when nothing is available."""
