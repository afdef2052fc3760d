# SPDX-License-Identifier: Apache-2.0
"""The common part of both batch engines: many buffers in one step, with a scalar fallback.

A step takes the leading run of buffers that are certainly valid.  If that run is empty, the scalar
engine handles a few buffers: it takes them or names the broken rule.  After such a fallback, the
next step examines few buffers, and four times as many after each success.  So a guest that makes
every buffer irregular costs no more than the scalar engine.
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
"""Number of buffers or chains below which array operations are slower than a loop."""


class Batching(Ring):
    """The batch half of an engine, a base class listed before the scalar class of its format."""

    _window: int
    _ones: NDArray[np.uint16]
    _count_up: NDArray[np.intp]
    _constant: dict[bool, NDArray[np.bool_]]

    def _prepare(self) -> None:
        """Create columns that most batches share as read-only slices."""
        self._window = self.size
        self._ones = np.ones(self.size, np.uint16)
        self._count_up = np.arange(self.size + 1)
        self._constant = {value: np.full(self.size, value) for value in (False, True)}
        self._ones.flags.writeable = self._count_up.flags.writeable = False
        for column in self._constant.values():
            column.flags.writeable = False

    def _claim(self, ids: NDArray[np.intp]) -> int:
        """Mark the leading free ids as taken, one slot each, and return their number.

        An id that occurs twice is free the first time only.  Raise :class:`IndexError`, with
        nothing marked, for an id that is out of range.
        """
        before = self._slots.copy()
        self._slots[ids] = 1
        # The count rises by one for each id, unless an id was taken already or occurs twice.
        if np.count_nonzero(self._slots) != self._outstanding + ids.size:
            self._slots[:] = before
            ids = ids[: self._first_taken(ids)]
            self._slots[ids] = 1
        return ids.size

    def _first_taken(self, ids: NDArray[np.intp]) -> int:
        """Return the index of the first id that is outstanding or occurred before."""
        _, first = np.unique(ids, return_index=True)
        taken = np.ones(ids.size, np.bool_)
        taken[first] = False
        taken |= self._slots.take(ids) != 0
        return int(np.argmax(taken))

    def _keep(
        self, batch: ChainBatch, claimed: NDArray[np.intp], slots: NDArray[np.uint16] | None
    ) -> int:
        """Keep only the ids of *batch* claimed and return the number of slots they occupy.

        *slots* (uint16[n]) is the number of slots of each buffer; None means one each.
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
        """Return the leading good buffers, each of one descriptor.

        *rows* are the raw descriptors; *write* says which, or whether all or none, are
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
        """Add new buffers to the in-flight record."""
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
        """Take the leading good run, possibly empty; return None if no buffer is available."""
