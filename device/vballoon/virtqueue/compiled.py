# SPDX-License-Identifier: Apache-2.0
"""The batch engines with their inner loops compiled (:mod:`vballoon.memory.native`).

They take the leading run of buffers that are in order beyond doubt, as the engines in NumPy do,
and leave the rest to the same scalar code; what differs is that chains are followed one after the
other in one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vballoon.errors import UsageError
from vballoon.memory.native import Native, native
from vballoon.virtqueue.base import ChainBatch
from vballoon.virtqueue.batching import Batching
from vballoon.virtqueue.inflight import NullInflight
from vballoon.virtqueue.packed import _available
from vballoon.virtqueue.packed_batch import BatchPacked
from vballoon.virtqueue.ring import BATCH_DESCRIPTORS
from vballoon.virtqueue.split_batch import BatchSplit
from vballoon_spec.virtio import packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from vballoon.virtqueue.areas import Area

__all__ = ("CompiledPacked", "CompiledSplit")

_FLAGS = 14  # offset of a packed descriptor's flags


class _Compiled(Batching):
    """What both formats have in common.  Made only where :data:`native` is there."""

    _desc: Area
    _each = 1
    """Descriptors of a buffer, rounded up, in the batch before: how much room to provide."""

    @property
    def _native(self) -> Native:
        assert native is not None  # make_virtqueue chooses these classes only then
        return native

    def _run(
        self, limit: int, ring: NDArray[np.uint16] | None, at: int, wrap: bool
    ) -> tuple[ChainBatch, NDArray[np.uint16], int]:
        """The leading good buffers, the slots of each, and the slots of all."""
        room = min(max(limit * self._each, limit + self.size), BATCH_DESCRIPTORS + self.size)
        ids, taken = np.empty(limit, np.uint16), np.empty(limit, np.uint16)
        first, addr = np.empty(limit + 1, np.intp), np.empty(room, np.uint64)
        length, writable = np.empty(room, np.uint32), np.empty(room, np.bool_)
        assert self._desc.bytes is not None  # batch engines serve mapped rings only
        count, elements, held = self._native.take_run(
            self._memory.tables, self._desc.bytes, ring, (at, wrap, self._indirect),
            self._slots, (ids, taken, first, addr, length, writable), limit, self._held,
        )  # fmt: skip
        if count:
            self._each = -(-elements // count)
        batch = ChainBatch(
            ids=ids[:count],
            first=first[: count + 1],
            addr=addr[:elements],
            len=length[:elements],
            writable=writable[:elements],
            memory=self._memory,
        )
        return batch, taken[:count], held - self._held

    def _check_given(
        self, ids: NDArray[np.uint16], written: NDArray[np.uint32]
    ) -> NDArray[np.uint16]:
        if self._in_order:
            return super()._check_given(ids, written)
        if ids.shape != written.shape:
            raise UsageError(f"{ids.size} buffers but {written.size} lengths")
        slots = np.empty(ids.size, np.uint16)
        if self._native.book_given(self._slots, _plain(ids, np.uint16), slots) < 0:
            raise UsageError("a buffer is given back that is not outstanding")
        return slots


class CompiledSplit(_Compiled, BatchSplit):
    """A split virtqueue."""

    def _take_run(self, limit: int) -> ChainBatch | None:
        pending = self._pending()
        if not pending:
            return None
        limit = min(limit, pending, self.size - self._held)
        batch, taken, slots = self._run(limit, self._heads, self._avail & (self.size - 1), False)
        if len(batch):
            self._consume(len(batch), slots)
            self._log_take(batch, taken, None)
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
        if not isinstance(self._inflight, NullInflight):  # wants the raw descriptors as well
            return super()._take_run(limit)
        if not _available(
            self._desc.load16(packed.PvirtqDesc.SIZE * self._avail + _FLAGS), self._avail_wrap
        ):
            return None
        limit = min(limit, self.size - self._held)
        batch, _, slots = self._run(limit, None, self._avail, self._avail_wrap)
        if len(batch):
            self._consume(len(batch), slots)
            self._count(batch, slots)
        return batch

    def _write_used(
        self, ids: NDArray[np.uint16], written: NDArray[np.uint32], slots: NDArray[np.uint16]
    ) -> Callable[[], None]:
        start, moved = self._used, int(slots.sum())
        ids, written = _plain(ids, np.uint16), _plain(written, np.uint32)
        assert self._desc.bytes is not None  # batch engines serve mapped rings only
        first = self._native.used_packed(
            self._desc.bytes, start, self._used_wrap, ids, written, _plain(slots, np.uint16)
        )
        self._mark_used(start, moved)
        self._used, self._used_wrap = self._step(start, self._used_wrap, moved)
        return lambda: self._desc.store16(packed.PvirtqDesc.SIZE * start + _FLAGS, first)


def _plain(column: NDArray[Any], dtype: type[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(column, dtype)
