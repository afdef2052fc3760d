# SPDX-License-Identifier: Apache-2.0
"""The split virtqueue, a batch at a time, on mapped rings.

Heads and descriptors are copied from the ring in one gather each, and only the copies are used.
Chains are followed together, one link of each in every round.  Indirect tables are read together.
Labels are as in :mod:`vballoon.virtqueue.split`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vballoon.virtqueue.base import ChainBatch
from vballoon.virtqueue.batching import FEW, Batching
from vballoon.virtqueue.circular import load_run, store_run
from vballoon.virtqueue.columns import Columns, Part, Tables, all_like_first, lengths_of, word16
from vballoon.virtqueue.ring import BATCH_DESCRIPTORS
from vballoon.virtqueue.split import ScalarSplit
from virtio_formats.virtio import split

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ("BatchSplit",)

_FLAGS, _NEXT = 6, 7  # 16-bit words of a descriptor
_CHAINED = split.VIRTQ_DESC_F_NEXT | split.VIRTQ_DESC_F_INDIRECT


class BatchSplit(Batching, ScalarSplit):
    """The device side of a split virtqueue whose three areas are mapped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()
        assert self._desc.bytes is not None
        assert self._driver.words is not None
        assert self._device.bytes is not None
        self._table = self._desc.bytes.view("V16")
        self._heads = self._driver.words[split.AVAIL_RING_OFFSET // 2 :][: self.size]
        elements = self._device.bytes[split.USED_RING_OFFSET :][: 8 * self.size]
        self._elements = elements.view(np.uint32).reshape(-1, 2)

    def _take_run(self, limit: int) -> ChainBatch | None:
        pending = self._pending()
        if not pending:
            return None
        count = min(limit, pending, self.size - self._held)
        heads = load_run(self._heads, self._avail & (self.size - 1), count)
        at = heads.astype(np.intp)
        try:
            at = at[: self._claim(at)]
        except IndexError:  # a head outside the table; the heads before it may be good
            at = at[: int(np.argmax(heads >= self.size))]
            at = at[: self._claim(at)]
        if not at.size:
            return self._empty
        batch, slots = self._buffers(heads[: at.size], self._rows(at))
        held = self._keep(batch, at, slots)
        if not held:
            return batch
        self._consume(len(batch), held)
        self._log_take(batch, slots, None)
        return self._count(batch, held)

    def _buffers(
        self, heads: NDArray[np.uint16], rows: NDArray[np.uint64]
    ) -> tuple[ChainBatch, NDArray[np.uint16] | None]:
        """Return the leading good buffers, and the ring descriptors of each (None: one)."""
        flags = word16(rows, _FLAGS)
        if all_like_first(flags):
            chained, write = int(flags[0]) & _CHAINED, bool(flags[0] & split.VIRTQ_DESC_F_WRITE)
            if not chained:
                return self._singles(heads, rows, write), None
        elif not np.bitwise_or.reduce(flags) & _CHAINED:
            return self._singles(heads, rows, (flags & split.VIRTQ_DESC_F_WRITE) != 0), None
        return self._chains(heads, rows)

    def _rows(self, at: NDArray[np.intp]) -> NDArray[np.uint64]:
        return self._table.take(at).view(np.uint64).reshape(at.size, 2)

    def _chains(
        self, heads: NDArray[np.uint16], rows: NDArray[np.uint64]
    ) -> tuple[ChainBatch, NDArray[np.uint16]]:
        """Return the leading good buffers if some have several descriptors."""
        follow = _Follow(self, rows)
        parts, end = follow.parts, follow.end
        columns = Columns(end, parts)
        good = columns.good(self._memory, self.size) if end else 0
        held = np.cumsum(follow.slots[:good], dtype=np.int64) + self._held
        good = int(np.searchsorted(held, self.size, side="right"))
        return columns.batch(self._memory, heads[:good]), follow.slots[:good]

    # giving

    def _write_used(
        self, ids: NDArray[np.uint16], written: NDArray[np.uint32], slots: NDArray[np.uint16]
    ) -> Callable[[], None]:
        elements = np.empty((ids.size, 2), np.uint32)
        elements[:, 0], elements[:, 1] = ids, written
        start = self._used & (self.size - 1)
        store_run(self._elements, start, elements)
        self._mark_used(start, ids.size)
        return lambda: self._publish((self._used + ids.size) & 0xFFFF)

    def _mark_used(self, start: int, count: int) -> None:
        """Log *count* used elements from *start* on."""
        size, fits = split.VirtqUsedElem.SIZE, min(count, self.size - start)
        self._device.mark(split.USED_RING_OFFSET + size * start, size * fits)
        self._device.mark(split.USED_RING_OFFSET, size * (count - fits))


class _Follow:
    """The state of following the chains at *rows* (their first descriptors) to their ends.

    ``end`` is the number of leading chains that end validly; ``parts`` are the elements found,
    ``slots`` (uint16[n]) is the number of ring descriptors of each chain.
    """

    def __init__(self, ring: BatchSplit, rows: NDArray[np.uint64]) -> None:
        self._ring = ring
        self.end = rows.shape[0]
        self.slots = np.zeros(self.end, np.uint16)
        self.parts: list[Part] = []
        self._tables: list[Tables] = []
        self._room = ring.size - ring._held
        chain = np.arange(self.end)
        while chain.size:
            chain, at = self._link(chain, rows)
            # More links than the ring has left are a loop, or chains that share descriptors.
            self._room -= chain.size
            if chain.size < FEW or self._room < 0:
                self._stop(chain)
                break
            rows = ring._rows(at)
        if self._tables:
            self._enter(_joined(self._tables))

    def _stop(self, bad: NDArray[np.intp]) -> None:
        if bad.size:
            self.end = min(self.end, int(bad.min()))

    def _link(
        self, chain: NDArray[np.intp], rows: NDArray[np.uint64]
    ) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Follow one link of every chain; return the chains that continue, and where."""
        self.slots[chain] += 1
        flags = word16(rows, _FLAGS)
        indirect = (flags & split.VIRTQ_DESC_F_INDIRECT) != 0
        if indirect.any():
            self._point(chain[indirect], rows[indirect], flags[indirect])
            chain, rows, flags = chain[~indirect], rows[~indirect], flags[~indirect]
        self.parts.append(_elements(chain, rows, flags))
        on = (flags & split.VIRTQ_DESC_F_NEXT) != 0
        chain, at = chain[on], word16(rows[on], _NEXT).astype(np.intp)
        self._stop(chain[at >= self._ring.size])
        keep = chain < self.end
        return chain[keep], at[keep]

    def _point(
        self, chain: NDArray[np.intp], rows: NDArray[np.uint64], flags: NDArray[np.uint16]
    ) -> None:
        """Handle descriptors that refer to tables; WRITE is ignored in them, NEXT is an error."""
        if not self._ring._indirect:
            self._stop(chain)
        self._stop(chain[(flags & split.VIRTQ_DESC_F_NEXT) != 0])
        self._tables.append(Tables(chain, rows[:, 0].copy(), lengths_of(rows).astype(np.uint64)))

    def _enter(self, tables: Tables) -> None:
        """Read the tables; a table whose entries do not follow each other is not plain."""
        memory, size = self._ring._memory, self._ring.size
        tables.cut(self.end)
        bad = tables.first_bad(memory, size, BATCH_DESCRIPTORS)
        if bad is not None:
            self.end = bad
            tables.cut(bad)
        if not tables.chain.size:
            return
        chain, rows, index, following = tables.read(memory)
        flags = word16(rows, _FLAGS)
        on = (flags & split.VIRTQ_DESC_F_NEXT) != 0
        odd = (flags & split.VIRTQ_DESC_F_INDIRECT) != 0
        odd |= on != (following > 0)
        odd |= on & (word16(rows, _NEXT) != index + 1)
        self._stop(chain[odd])
        self.parts.append(_elements(chain, rows, flags))


def _elements(chain: NDArray[np.intp], rows: NDArray[np.uint64], flags: NDArray[np.uint16]) -> Part:
    writable = (flags & split.VIRTQ_DESC_F_WRITE) != 0
    return Part(chain, rows[:, 0].copy(), lengths_of(rows), writable)


def _joined(tables: list[Tables]) -> Tables:
    return Tables(
        np.concatenate([t.chain for t in tables]),
        np.concatenate([t.addr for t in tables]),
        np.concatenate([t.len for t in tables]),
    )
