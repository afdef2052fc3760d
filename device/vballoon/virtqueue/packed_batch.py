# SPDX-License-Identifier: Apache-2.0
"""The packed virtqueue, a batch at a time, on mapped rings.

The run of available descriptors is found in one copy of their flags.  Then their bytes are copied,
and only the copies are used.  Labels are as in :mod:`vballoon.virtqueue.packed`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vballoon.memory import fence
from vballoon.virtqueue.base import ChainBatch
from vballoon.virtqueue.batching import Batching
from vballoon.virtqueue.circular import load_run, store_run
from vballoon.virtqueue.columns import Columns, Part, Tables, all_like_first, lengths_of, word16
from vballoon.virtqueue.packed import _BOTH, ScalarPacked, _available
from vballoon.virtqueue.ring import BATCH_DESCRIPTORS
from virtio_formats.virtio import packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ("BatchPacked",)

_ID, _FLAGS = 6, 7  # 16-bit words of a descriptor
_LEN, _ID_FLAGS = 2, 3  # 32-bit words
_CHAINED = packed.VIRTQ_DESC_F_NEXT | packed.VIRTQ_DESC_F_INDIRECT


class BatchPacked(Batching, ScalarPacked):
    """The device side of a packed virtqueue whose three areas are mapped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()
        assert self._desc.bytes is not None
        self._rows = self._desc.bytes.view("V16")
        self._words = self._desc.bytes.view(np.uint32).reshape(-1, 4)
        self._flag_column = self._desc.bytes.view(np.uint16).reshape(-1, 8)[:, _FLAGS]

    # taking

    def _take_run(self, limit: int) -> ChainBatch | None:
        head = self._desc.load16(packed.PvirtqDesc.SIZE * self._avail + 2 * _FLAGS)
        if not _available(head, self._avail_wrap):
            return None
        flags = self._available_run(limit)
        # Read the descriptors after the flags (label: … / Updating flags).
        fence.acquire()
        raw = load_run(self._rows, self._avail, flags.size)
        rows = raw.view(np.uint64).reshape(flags.size, 2)
        batch, slots = self._buffers(rows, flags, limit)
        if not len(batch):
            return batch
        held = len(batch) if slots is None else int(slots.sum())
        self._consume(len(batch), held)
        self._log_take(batch, slots, raw[:held].view(packed.PvirtqDesc.dtype()))
        return self._count(batch, held)

    def _buffers(
        self, rows: NDArray[np.uint64], flags: NDArray[np.uint16], limit: int
    ) -> tuple[ChainBatch, NDArray[np.uint16] | None]:
        """Return the leading good buffers, and the ring descriptors of each (None: one)."""
        if not flags.size:
            return self._empty, None
        write: bool | NDArray[np.bool_] = bool(flags[0] & packed.VIRTQ_DESC_F_WRITE)
        if all_like_first(flags):
            chained = int(flags[0]) & _CHAINED
        else:
            chained = int(np.bitwise_or.reduce(flags)) & _CHAINED
            write = (flags & packed.VIRTQ_DESC_F_WRITE) != 0
        if chained:
            return self._lists(rows, flags, limit)
        ids = word16(rows, _ID)[:limit].copy()
        at = self._claimed(ids)
        batch = self._singles(ids[: at.size], rows[: at.size], write)
        self._keep(batch, at, None)
        return batch, None

    def _claimed(self, ids: NDArray[np.uint16]) -> NDArray[np.intp]:
        """Claim the leading free ids and return their number."""
        at = ids.astype(np.intp)
        try:
            return at[: self._claim(at)]
        except IndexError:
            self._admit(int(at.max()))
            return at[: self._claim(at)]

    def _available_run(self, limit: int) -> NDArray[np.uint16]:
        """Return the flags of the leading available descriptors, as if the wrap counter were 1."""
        room = min(self.size - self._held, max(limit, 64))
        flags = load_run(self._flag_column, self._avail, room)
        if not room:
            return flags
        if not self._avail_wrap:
            flags ^= np.uint16(_BOTH)
        flags[self.size - self._avail :] ^= np.uint16(_BOTH)
        if _available(int(flags[0]), True) and all_like_first(flags):
            return flags
        ready = (flags & np.uint16(_BOTH)) == packed.VIRTQ_DESC_F_AVAIL
        return flags if np.count_nonzero(ready) == room else flags[: int(ready.argmin())]

    def _lists(
        self, rows: NDArray[np.uint64], flags: NDArray[np.uint16], limit: int
    ) -> tuple[ChainBatch, NDArray[np.uint16]]:
        """Return the leading good buffers if some have several descriptors.

        The scalar engine handles a list that the end of the run cuts off.
        """
        last = np.flatnonzero((flags & packed.VIRTQ_DESC_F_NEXT) == 0)[:limit]
        ids = word16(rows, _ID)[last]
        at = self._claimed(ids)
        last = last[: at.size]
        slots = np.diff(last, prepend=-1)
        chain = np.repeat(np.arange(last.size), slots)
        end, parts = self._elements(chain, rows[: chain.size], flags[: chain.size], slots)
        columns = Columns(end, parts)
        good = columns.good(self._memory, self.size) if end else 0
        batch, count = columns.batch(self._memory, ids[:good]), slots[:good].astype(np.uint16)
        self._keep(batch, at, count)
        return batch, count

    def _elements(
        self,
        chain: NDArray[np.intp],
        rows: NDArray[np.uint64],
        flags: NDArray[np.uint16],
        slots: NDArray[np.intp],
    ) -> tuple[int, list[Part]]:
        """Return the number of chains with valid elements, and the elements."""
        write = (flags & packed.VIRTQ_DESC_F_WRITE) != 0
        indirect = (flags & packed.VIRTQ_DESC_F_INDIRECT) != 0
        if not indirect.any():
            return slots.size, [Part(chain, rows[:, 0].copy(), lengths_of(rows), write)]
        direct = ~indirect
        parts = [
            Part(chain[direct], rows[direct, 0], lengths_of(rows[direct]), write[direct]),
        ]
        owner = chain[indirect]
        bad = owner if not self._indirect else owner[slots[owner] > 1]
        end = int(bad.min()) if bad.size else slots.size
        tables = Tables(owner, rows[indirect, 0], lengths_of(rows[indirect]).astype(np.uint64))
        tables.cut(end)
        odd = tables.first_bad(self._memory, self.size, BATCH_DESCRIPTORS)
        end = end if odd is None else odd
        tables.cut(end)
        if tables.chain.size:
            owner, entries, _, _ = tables.read(self._memory)
            write = (word16(entries, _FLAGS) & packed.VIRTQ_DESC_F_WRITE) != 0
            parts.append(Part(owner, entries[:, 0].copy(), lengths_of(entries), write))
        return end, parts

    # giving

    def _write_used(
        self, ids: NDArray[np.uint16], written: NDArray[np.uint32], slots: NDArray[np.uint16]
    ) -> Callable[[], None]:
        start, moved = self._used, int(slots.sum())
        if moved == ids.size:
            place = np.arange(start, start + moved)
        else:
            place = start + np.cumsum(slots, dtype=np.intp) - slots
        flags = (written != 0) * np.uint16(packed.VIRTQ_DESC_F_WRITE)
        if self._used_wrap:
            flags |= np.uint16(_BOTH)
        if place[-1] >= self.size:
            flags[place >= self.size] ^= np.uint16(_BOTH)
        first = int(flags[0])
        # The publishing store writes the flags of the first one; until then they are unchanged.
        flags[0] = self._flag_column[start]
        self._store(place, written, ids | flags.astype(np.uint32) << np.uint32(16), moved)
        self._used, self._used_wrap = self._step(start, self._used_wrap, moved)
        return lambda: self._desc.store16(packed.PvirtqDesc.SIZE * start + 2 * _FLAGS, first)

    def _store(
        self,
        place: NDArray[np.intp],
        written: NDArray[np.uint32],
        tail: NDArray[np.uint32],
        moved: int,
    ) -> None:
        """Store the last two words of the used descriptors at *place* (before the modulo)."""
        start = int(place[0])
        if moved == place.size:
            store_run(self._words[:, _LEN], start, written)
            store_run(self._words[:, _ID_FLAGS], start, tail)
        else:
            place %= self.size
            self._words[place, _LEN] = written
            self._words[place, _ID_FLAGS] = tail
        self._mark_used(start, moved)

    def _mark_used(self, start: int, moved: int) -> None:
        """Log *moved* descriptors from *start* on."""
        fits = min(moved, self.size - start)
        self._desc.mark(packed.PvirtqDesc.SIZE * start, packed.PvirtqDesc.SIZE * fits)
        self._desc.mark(0, packed.PvirtqDesc.SIZE * (moved - fits))
