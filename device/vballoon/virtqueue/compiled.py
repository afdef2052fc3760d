# SPDX-License-Identifier: Apache-2.0
"""The batch engines with their inner loops compiled (:mod:`vballoon.native`).

Like the engines in NumPy, they take the leading run of buffers that are certainly valid and leave
the rest to the same scalar code.  Unlike those, they follow the chains one after the other in one
pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vballoon.errors import UsageError
from vballoon.native import RingLoops, native
from vballoon.virtqueue.base import ChainBatch
from vballoon.virtqueue.batching import Batching
from vballoon.virtqueue.inflight import NullInflight
from vballoon.virtqueue.packed import _available
from vballoon.virtqueue.packed_batch import BatchPacked
from vballoon.virtqueue.ring import BATCH_DESCRIPTORS
from vballoon.virtqueue.split_batch import BatchSplit
from virtio_formats.virtio import packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from vballoon.virtqueue.areas import Area

__all__ = ("CompiledPacked", "CompiledSplit")

_FLAGS = 14  # offset of a packed descriptor's flags


class _Compiled(Batching):
    """The common part of both formats, used only if :data:`native` is available."""

    _desc: Area
    _sum = 0
    """Number of ring descriptors of the buffers given back last."""
    _chained = False
    """The previous batch had buffers of several descriptors, so allocate space for them."""
    _stopped = False
    """The last run ended before its limit, at an irregular buffer or for lack of space."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert native is not None  # make_virtqueue chooses these classes only if it is available
        self._native: RingLoops = native
        assert self._desc.bytes is not None  # batch engines serve mapped rings only
        self._bytes = self._desc.bytes
        self._taken, self._first = np.empty(self.size, np.uint16), np.empty(self.size + 1, np.intp)

    def _take_new(self, limit: int, batch: ChainBatch | None = None) -> ChainBatch:
        """Take new buffers like every ring; if one step takes them all, it is enough."""
        if batch is None and self._window == self.size:
            batch = self._take_run(limit)
            if batch is None:
                return self._empty
            if batch.ids.size and not self._stopped:
                return batch
        return super()._take_new(limit, batch)

    def _run(
        self, limit: int, ring: NDArray[np.uint16] | None, at: int, wrap: bool
    ) -> tuple[ChainBatch, int]:
        """Return the leading good buffers and their total of slots; ``_taken`` has each."""
        room = limit
        if self._chained:
            room = min(limit * self.size, BATCH_DESCRIPTORS + self.size)
        ids, addr = np.empty(limit, np.uint16), np.empty(room, np.uint64)
        length, writable = np.empty(room, np.uint32), np.empty(room, np.bool_)
        count, elements, held = self._native.take_run(
            self._memory.tables,
            self._bytes,
            ring,
            (at, wrap, self._indirect),
            self._slots,
            (ids, self._taken, self._first, addr, length, writable),
            limit,
            self._held,
        )
        self._stopped = count < limit
        if self._stopped and not self._chained:
            self._chained = True
            if not count:
                return self._run(limit, ring, at, wrap)
        plain = elements == count
        if not self._stopped:
            self._chained = not plain
        batch = ChainBatch(
            ids[:count] if self._stopped else ids,
            self._count_up[: count + 1] if plain else self._first[: count + 1].copy(),
            addr[:elements],
            length[:elements],
            writable[:elements],
            self._memory,
        )
        return batch, held - self._held

    def _check_given(
        self, ids: NDArray[np.uint16], written: NDArray[np.uint32]
    ) -> NDArray[np.uint16]:
        if self._in_order:
            slots = super()._check_given(ids, written)
            self._sum = int(slots.sum())
            return slots
        if ids.shape != written.shape:
            raise UsageError(f"{ids.size} buffers but {written.size} lengths")
        slots = np.empty(ids.size, np.uint16)
        self._sum = self._native.book_given(self._slots, _plain(ids, np.uint16), slots)
        if self._sum < 0:
            raise UsageError("a buffer that is not outstanding is given back")
        return slots

    def _freed(self, slots: NDArray[np.uint16]) -> int:
        return self._sum


class CompiledSplit(_Compiled, BatchSplit):
    """A split virtqueue."""

    def _take_run(self, limit: int) -> ChainBatch | None:
        pending = self._pending()
        if not pending:
            return None
        limit = min(limit, pending, self.size - self._held)
        batch, slots = self._run(limit, self._heads, self._avail & (self.size - 1), False)
        if batch.ids.size:
            self._consume(batch.ids.size, slots)
            if not isinstance(self._inflight, NullInflight):
                self._log_take(batch, self._taken[: batch.ids.size].copy(), None)
            self._count(batch, slots)
        return batch

    def _write_used(
        self, ids: NDArray[np.uint16], written: NDArray[np.uint32], slots: NDArray[np.uint16]
    ) -> Callable[[], None]:
        start = self._used & (self.size - 1)
        ids, written = _plain(ids, np.uint16), _plain(written, np.uint32)
        self._native.used_split(self._elements, start, ids, written)
        self._mark_used(start, ids.size)
        return lambda: self._publish((self._used + ids.size) & 0xFFFF)


class CompiledPacked(_Compiled, BatchPacked):
    """A packed virtqueue."""

    def _take_run(self, limit: int) -> ChainBatch | None:
        if not isinstance(self._inflight, NullInflight):  # also needs the raw descriptors
            return super()._take_run(limit)
        if not _available(
            self._desc.load16(packed.PvirtqDesc.SIZE * self._avail + _FLAGS), self._avail_wrap
        ):
            return None
        limit = min(limit, self.size - self._held)
        batch, slots = self._run(limit, None, self._avail, self._avail_wrap)
        if batch.ids.size:
            self._consume(batch.ids.size, slots)
            self._count(batch, slots)
        return batch

    def _write_used(
        self, ids: NDArray[np.uint16], written: NDArray[np.uint32], slots: NDArray[np.uint16]
    ) -> Callable[[], None]:
        start, moved = self._used, self._sum
        ids, written = _plain(ids, np.uint16), _plain(written, np.uint32)
        first = self._native.used_packed(
            self._bytes, start, self._used_wrap, ids, written, _plain(slots, np.uint16)
        )
        self._mark_used(start, moved)
        self._used, self._used_wrap = self._step(start, self._used_wrap, moved)
        return lambda: self._desc.store16(packed.PvirtqDesc.SIZE * start + _FLAGS, first)


def _plain(column: NDArray[Any], dtype: type[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(column, dtype)
