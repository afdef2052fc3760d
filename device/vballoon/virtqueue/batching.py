# SPDX-License-Identifier: Apache-2.0
"""What both batch engines add to a ring: many buffers in one step, and the scalar way out.

A step takes the leading run of buffers that are in order beyond doubt.  Where that run is empty,
a few buffers go through the scalar engine, which takes them or names the broken rule.  After such
a detour the next step looks at few buffers, and at four times as many with each success, so that
a guest which makes every buffer odd costs what the scalar engine costs and no more.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from vballoon.virtqueue.base import ChainBatch
from vballoon.virtqueue.columns import lengths_of
from vballoon.virtqueue.inflight import NullInflight
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

    def _claim(self, ids: NDArray[np.intp]) -> int:
        """Mark the leading ids that are free as taken, one slot each; returns how many.

        An id that occurs twice is free the first time only.  Raises :class:`IndexError`, and
        marks nothing, for an id that is out of range.
        """
        before = self._slots.copy()
        self._slots[ids] = 1
        # One more for each, or else one of them was taken already or is there twice.
        if np.count_nonzero(self._slots) != self._outstanding + ids.size:
            self._slots[:] = before
            ids = ids[: self._first_taken(ids)]
            self._slots[ids] = 1
        return ids.size

    def _first_taken(self, ids: NDArray[np.intp]) -> int:
        """Where the first id is that is outstanding, or that has been there before."""
        _, first = np.unique(ids, return_index=True)
        taken = np.ones(ids.size, np.bool_)
        taken[first] = False
        taken |= self._slots.take(ids) != 0
        return int(np.argmax(taken))

    def _keep(
        self, batch: ChainBatch, claimed: NDArray[np.intp], slots: NDArray[np.uint16] | None
    ) -> int:
        """Of the *claimed* ids only those of *batch* are taken; returns the slots they occupy.

        *slots* (uint16[n]) are those of each buffer; None: one each.
        """
        if len(batch) < claimed.size:
            self._slots[claimed[len(batch) :]] = 0
        if slots is None:
            return len(batch)
        self._slots[claimed[: len(batch)]] = slots
        return int(slots.sum())

    def _singles(
        self, ids: NDArray[np.uint16], rows: NDArray[np.uint64], write: NDArray[np.bool_] | bool
    ) -> ChainBatch:
        """The leading good buffers of those that have one descriptor each.

        *rows* are the raw descriptors, *write* says which (or that all or none) are
        device-writable.
        """
        addr, length = rows[:, 0].copy(), lengths_of(rows)
        inside = self._memory.contains(addr, length)
        good = ids.size
        if np.count_nonzero(inside) != good:
            good = int(inside.argmin())
        return ChainBatch(
            ids=ids[:good],
            first=self._count_up[: good + 1],
            addr=addr[:good],
            len=length[:good],
            writable=(self._constant[write] if isinstance(write, bool) else write)[:good],
            memory=self._memory,
        )

    def _log_take(
        self, batch: ChainBatch, slots: NDArray[np.uint16] | None, ring: NDArray[Any] | None
    ) -> None:
        """Tell the in-flight record of new buffers."""
        if not isinstance(self._inflight, NullInflight):
            ones = self._ones[: len(batch)]
            self._inflight.on_take(batch.ids, ones if slots is None else slots, ring)

    def _take_part(self, limit: int) -> ChainBatch:
        part = self._take_run(min(limit, self._window))
        if part is None:
            return self._empty
        if len(part):
            self._window = min(4 * self._window, self.size)
            return part
        self._window = 4 * FEW
        return self._take_walking(min(limit, FEW))

    @abstractmethod
    def _take_run(self, limit: int) -> ChainBatch | None:
        """The leading good run, booked (perhaps empty); None when nothing is available."""
