# SPDX-License-Identifier: Apache-2.0
"""The split virtqueue, one descriptor at a time: obviously right, for every kind of memory.

Guest data is fetched once: each descriptor is copied and only the copy is looked at.  Labels are
those of the virtio specification, git revision 15f488c1, under "Basic Facilities of a Virtio
Device / Virtqueues".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vballoon.errors import QueueError, UsageError
from vballoon.memory import fence
from vballoon.virtqueue import rules
from vballoon.virtqueue.areas import Area
from vballoon.virtqueue.base import ChainBatch, RingState, Virtqueue, empty_batch
from vballoon.virtqueue.chain import Chain, batch_of, check_indirect_table
from vballoon.virtqueue.inflight import InflightLog, NullInflight, Resubmit
from vballoon_spec.virtio import features as f
from vballoon_spec.virtio import split

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from vballoon.memory import GuestMemory
    from vballoon.virtqueue.base import RingAddresses

__all__ = ("ScalarSplit",)

_U16 = 0xFFFF


class ScalarSplit(Virtqueue):
    """Device side of a split virtqueue."""

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        addresses: RingAddresses,
        features: int,
        state: RingState,
        *,
        inflight: InflightLog | None = None,
        dirty_ring: int | None = None,
        resubmit: Resubmit | None = None,
    ) -> None:
        if not 0 < size <= split.QUEUE_SIZE_MAX or size & (size - 1):
            raise QueueError(rules.RING_SIZE, f"{size}")
        self.size = size
        self._memory = memory
        self._event_idx = f.has(features, f.VIRTIO_F_EVENT_IDX)
        self._indirect = f.has(features, f.VIRTIO_F_INDIRECT_DESC)
        self._in_order = f.has(features, f.VIRTIO_F_IN_ORDER)
        event = self._event_idx
        self._desc = Area(memory, addresses.desc, split.desc_size(size), split.DESC_ALIGN)
        self._driver = Area(
            memory, addresses.driver, split.avail_size(size, event), split.AVAIL_ALIGN
        )
        self._device = Area(
            memory, addresses.device, split.used_size(size, event), split.USED_ALIGN, dirty_ring
        )
        self._avail = state.avail & _U16
        self._used = state.used & _U16
        self._outstanding = 0
        self._busy = np.zeros(size, np.bool_)
        self._order: list[int] = []
        self._inflight = inflight or NullInflight()
        self._resubmit = self._heads_again(resubmit)
        # What an earlier backend gave back, it may not have lived to announce.
        self._notify_anyway = resubmit is not None
        self._signalled = self._used
        self._kicks = True
        self._arm()

    # taking

    def take(self, limit: int | None = None) -> ChainBatch:
        """See :meth:`Virtqueue.take`."""
        limit = self.size if limit is None else limit
        if self._resubmit:
            return self._take_again(limit)
        pending = self._pending() or self._rearm_when_empty()
        return self._take_new(min(pending, limit))

    def _pending(self) -> int:
        """How many heads wait; the index is loaded once."""
        pending = (self._driver.load16(split.AVAIL_IDX_OFFSET) - self._avail) & _U16
        # What the index promises is read after it (label: … / Updating idx).
        fence.acquire()
        if pending > self.size:
            raise QueueError(rules.AVAIL_IDX_JUMP, f"{pending} buffers in a ring of {self.size}")
        return pending

    def _take_new(self, count: int) -> ChainBatch:
        """The first *count* available buffers, or the good ones in front of a bad one."""
        chains = self._take_scalar(count)
        if not chains:
            return empty_batch(self._memory)
        return self._taken(batch_of(self._memory, chains))

    def _take_scalar(self, count: int) -> list[Chain]:
        slots = ((self._avail + i) % self.size for i in range(count))
        return self._walk_all(
            self._driver.load16(split.AVAIL_RING_OFFSET + 2 * slot) for slot in slots
        )

    def _walk_all(self, heads: Iterable[int]) -> list[Chain]:
        """The chains at *heads*, up to the first bad one; that one's error if it is the first."""
        chains: list[Chain] = []
        for head in heads:
            try:
                chains.append(self._walk(head))
            except QueueError:
                if not chains:
                    raise
                break
            self._busy[head] = True  # for the heads that follow
        for chain in chains:
            self._busy[chain.id] = False  # nothing is booked yet
        return chains

    def _taken(self, batch: ChainBatch) -> ChainBatch:
        """Book a batch of new buffers and tell the in-flight record."""
        self._avail = (self._avail + len(batch)) & _U16
        self._inflight.on_take(batch.ids, np.ones(len(batch), np.uint16), None)
        return self._book(batch)

    def _book(self, batch: ChainBatch) -> ChainBatch:
        self._busy[batch.ids] = True
        self._outstanding += len(batch)
        if self._in_order:
            self._order.extend(batch.ids.tolist())
        return batch

    def _walk(self, head: int) -> Chain:
        """The chain at descriptor *head*, every rule checked."""
        if head >= self.size:
            raise QueueError(rules.HEAD_RANGE, f"{head} in a table of {self.size}")
        if self._busy[head]:
            raise QueueError(rules.BUFFER_REUSED, f"head {head}")
        chain = Chain(self._memory, self.size, id=head)
        table: tuple[int, int] | None = None  # address and length of the indirect table we are in
        count, index, visited = self.size, head, 0
        while True:
            desc = self._fetch(table, index)
            if desc.flags & split.VIRTQ_DESC_F_INDIRECT:
                table, count = self._enter(desc, nested=table is not None)
                index = visited = 0
                continue
            chain.add(desc.addr, desc.len, bool(desc.flags & split.VIRTQ_DESC_F_WRITE))
            if not desc.flags & split.VIRTQ_DESC_F_NEXT:
                return chain
            visited += 1
            if visited >= count:
                raise QueueError(rules.DESC_CHAIN_LOOP, f"at descriptor {index}")
            if desc.next >= count:
                raise QueueError(rules.DESC_NEXT_RANGE, f"{desc.next} in a table of {count}")
            index = desc.next

    def _fetch(self, table: tuple[int, int] | None, index: int) -> split.VirtqDesc:
        at = split.VirtqDesc.SIZE * index
        if table is None:
            return split.VirtqDesc.parse(self._desc.load(at, split.VirtqDesc.SIZE))
        return split.VirtqDesc.parse(self._memory.read(table[0] + at, split.VirtqDesc.SIZE))

    def _enter(self, desc: split.VirtqDesc, nested: bool) -> tuple[tuple[int, int], int]:
        """Step into an indirect table (label: … / Indirect Descriptors).

        The descriptor's WRITE flag is ignored, as the standard wants.
        """
        if nested:
            raise QueueError(rules.INDIRECT_NESTED)
        if desc.flags & split.VIRTQ_DESC_F_NEXT and self._indirect:
            raise QueueError(rules.INDIRECT_WITH_NEXT)
        count = check_indirect_table(self._memory, self._indirect, desc.addr, desc.len)
        return (desc.addr, desc.len), count

    # buffers of an earlier life

    def _heads_again(self, resubmit: Resubmit | None) -> list[int]:
        heads = [] if resubmit is None else [int(i) for i in resubmit.ids]
        if len(set(heads)) != len(heads):
            raise QueueError(rules.BUFFER_REUSED, "in the in-flight record")
        return heads

    def _take_again(self, limit: int) -> ChainBatch:
        """Buffers that were in flight before; their descriptors are still in the table."""
        chains = self._walk_all(self._resubmit[:limit])
        del self._resubmit[: len(chains)]
        return self._book(batch_of(self._memory, chains))

    # giving

    def give(self, ids: NDArray[np.uint16], written: NDArray[np.uint32]) -> None:
        """See :meth:`Virtqueue.give`."""
        self._check_ids(ids, written)
        if not ids.size:
            return
        self._write_used(ids, written)
        self._inflight.before_give(ids)
        # Elements first, then the index (label: … / The Virtqueue Used Ring).
        fence.release()
        self._used = (self._used + int(ids.size)) & _U16
        self._device.store16(split.USED_IDX_OFFSET, self._used)
        self._busy[ids] = False
        self._outstanding -= int(ids.size)
        self._inflight.after_give(ids, self.state())

    def _check_ids(self, ids: NDArray[np.uint16], written: NDArray[np.uint32]) -> None:
        if ids.shape != written.shape:
            raise UsageError(f"{ids.size} buffers but {written.size} lengths")
        wanted = ids.tolist()
        if len(set(wanted)) != len(wanted) or any(
            i >= self.size or not self._busy[i] for i in wanted
        ):
            raise UsageError("a buffer is given back that is not outstanding")
        self._check_order(wanted)

    def _check_order(self, wanted: list[int]) -> None:
        if not self._in_order:
            return
        if self._order[: len(wanted)] != wanted:
            raise UsageError("VIRTIO_F_IN_ORDER: buffers must be given back as they were taken")
        del self._order[: len(wanted)]

    def _write_used(self, ids: NDArray[np.uint16], written: NDArray[np.uint32]) -> None:
        """One element for each buffer, in-order rings too (there one for a batch is optional)."""
        slot = self._used
        for head, length in zip(ids.tolist(), written.tolist(), strict=True):
            at = split.USED_RING_OFFSET + split.VirtqUsedElem.SIZE * (slot % self.size)
            self._device.store(at, split.VirtqUsedElem(id=head, len=length).build())
            slot += 1

    # notifications

    def should_notify(self) -> bool:
        """See :meth:`Virtqueue.should_notify` (label: … / Used Buffer Notification Suppression)."""
        new, old, self._signalled = self._used, self._signalled, self._used
        if self._notify_anyway:
            self._notify_anyway = False
            return True
        if new == old:
            return False
        fence.full()
        if not self._event_idx:
            return not self._driver.load16(0) & split.VIRTQ_AVAIL_F_NO_INTERRUPT
        event = self._driver.load16(split.used_event_offset(self.size))
        # True when the element with index `event` is one of those written since: old <= event < new
        return (event - old) & _U16 < (new - old) & _U16

    def disable_kicks(self) -> None:
        """See :meth:`Virtqueue.disable_kicks`; with event indices the last one is left stale."""
        self._kicks = False
        if not self._event_idx:
            self._device.store16(0, split.VIRTQ_USED_F_NO_NOTIFY)

    def enable_kicks(self) -> bool:
        """See :meth:`Virtqueue.enable_kicks`."""
        self._kicks = True
        self._arm()
        fence.full()
        return self._driver.load16(split.AVAIL_IDX_OFFSET) != self._avail

    def _arm(self) -> None:
        """Ask for a notification at the next buffer; stores only what is not so already."""
        if self._event_idx:
            at, value = split.avail_event_offset(self.size), self._avail
        else:
            at, value = 0, 0
        if self._device.load16(at) != value:
            self._device.store16(at, value)

    def _rearm_when_empty(self) -> int:
        """Before saying "nothing there", ask to be told of the next buffer, and look once more."""
        if not self._kicks or not self._event_idx:
            return 0
        self._arm()
        fence.full()
        return self._pending()

    def state(self) -> RingState:
        """See :meth:`Virtqueue.state`."""
        return RingState(avail=self._avail, used=self._used)

    @property
    def outstanding(self) -> int:
        """See :attr:`Virtqueue.outstanding`."""
        return self._outstanding
