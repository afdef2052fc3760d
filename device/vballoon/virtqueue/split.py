# SPDX-License-Identifier: Apache-2.0
"""The split virtqueue, one descriptor at a time, for every kind of memory.

Guest data is fetched once: each descriptor is copied, and only the copy is used.  Labels are
those of the virtio specification, git revision 15f488c1, under "Basic Facilities of a Virtio
Device / Virtqueues".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vballoon.errors import QueueError
from vballoon.memory import fence
from vballoon.virtqueue import rules
from vballoon.virtqueue.areas import Area
from vballoon.virtqueue.base import RingState
from vballoon.virtqueue.chain import Chain, check_indirect_table
from vballoon.virtqueue.ring import Ring
from virtio_formats.virtio import split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from vballoon.memory import GuestMemory
    from vballoon.virtqueue.base import RingAddresses
    from vballoon.virtqueue.inflight import InflightLog, Resubmit

__all__ = ("ScalarSplit",)

_U16 = 0xFFFF


class ScalarSplit(Ring):
    """The device side of a split virtqueue."""

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
        super().__init__(memory, size, features, inflight=inflight, resubmit=resubmit)
        event = self._event_idx
        self._desc = Area(memory, addresses.desc, split.desc_size(size), split.DESC_ALIGN)
        self._driver = Area(
            memory, addresses.driver, split.avail_size(size, event), split.AVAIL_ALIGN
        )
        self._device = Area(
            memory, addresses.device, split.used_size(size, event), split.USED_ALIGN, dirty_ring
        )
        self._avail = state.avail & _U16
        self._used = self._signalled = state.used & _U16
        self._arm()

    # taking

    def _pending(self) -> int:
        """Return the number of available heads; load the index once."""
        pending = (self._driver.load16(split.AVAIL_IDX_OFFSET) - self._avail) & _U16
        # Read the ring entries after the index (label: … / Updating idx).
        fence.acquire()
        if pending > self.size:
            raise QueueError(rules.AVAIL_IDX_JUMP, f"{pending} buffers in a ring of {self.size}")
        return pending

    def _walk_available(self, limit: int) -> Iterator[Chain]:
        for i in range(min(limit, self._pending())):
            slot = (self._avail + i) % self.size
            yield self._walk(self._driver.load16(split.AVAIL_RING_OFFSET + 2 * slot))

    def _consume(self, buffers: int, slots: int) -> None:
        self._avail = (self._avail + buffers) & _U16

    def _walk(self, head: int) -> Chain:
        """Return the chain at descriptor *head*, with every rule checked."""
        if head >= self.size:
            raise QueueError(rules.HEAD_RANGE, f"{head} in a table of {self.size}")
        if self._is_busy(head):
            raise QueueError(rules.BUFFER_REUSED, f"head {head}")
        chain = Chain(self._memory, self.size, id=head)
        table: int | None = None  # address of the current indirect table
        count, index, visited = self.size, head, 1
        while True:
            desc = self._fetch(table, index)
            if desc.flags & split.VIRTQ_DESC_F_INDIRECT:
                count = self._enter(desc, nested=table is not None)
                table, chain.slots, index, visited = desc.addr, visited, 0, 1
                continue
            chain.add(desc.addr, desc.len, bool(desc.flags & split.VIRTQ_DESC_F_WRITE))
            if not desc.flags & split.VIRTQ_DESC_F_NEXT:
                break
            if visited == count:
                raise QueueError(rules.DESC_CHAIN_LOOP, f"at descriptor {index}")
            if desc.next >= count:
                raise QueueError(rules.DESC_NEXT_RANGE, f"{desc.next} in a table of {count}")
            index, visited = desc.next, visited + 1
        if table is None:
            chain.slots = visited
        return chain

    def _fetch(self, table: int | None, index: int) -> split.VirtqDesc:
        at, size = split.VirtqDesc.SIZE * index, split.VirtqDesc.SIZE
        if table is None:
            return split.VirtqDesc.parse(self._desc.load(at, size))
        return split.VirtqDesc.parse(self._memory.read(table + at, size))

    def _enter(self, desc: split.VirtqDesc, nested: bool) -> int:
        """Enter an indirect table (label: … / Indirect Descriptors) and return its descriptors.

        The WRITE flag of the descriptor is ignored, as the standard requires.
        """
        if nested:
            raise QueueError(rules.INDIRECT_NESTED)
        if desc.flags & split.VIRTQ_DESC_F_NEXT and self._indirect:
            raise QueueError(rules.INDIRECT_WITH_NEXT)
        return check_indirect_table(self._memory, self._indirect, desc.addr, desc.len)

    def _earlier(self, resubmit: Resubmit) -> Iterable[int]:
        return [int(head) for head in resubmit.ids]

    def _walk_again(self, entry: int) -> Chain:
        return self._walk(entry)  # its descriptors are still in the table

    # giving

    def _write_used(
        self, ids: NDArray[np.uint16], written: NDArray[np.uint32], slots: NDArray[np.uint16]
    ) -> Callable[[], None]:
        """Write one element for each buffer, also in in-order rings."""
        slot = self._used
        for head, length in zip(ids.tolist(), written.tolist(), strict=True):
            at = split.USED_RING_OFFSET + split.VirtqUsedElem.SIZE * (slot % self.size)
            self._device.store(at, split.VirtqUsedElem(id=head, len=length).build())
            slot += 1
        return lambda: self._publish(slot & _U16)

    def _publish(self, used: int) -> None:
        self._used = used
        self._device.store16(split.USED_IDX_OFFSET, used)

    # notifications

    def should_notify(self) -> bool:
        """Implement :meth:`Virtqueue.should_notify` (… / Used Buffer Notification Suppression)."""
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
        # True if the element with index `event` was written since: old <= event < new
        return (event - old) & _U16 < (new - old) & _U16

    def disable_kicks(self) -> None:
        """Implement :meth:`Virtqueue.disable_kicks`; with event indices, keep the last one."""
        self._kicks = False
        if not self._event_idx:
            self._device.store16(0, split.VIRTQ_USED_F_NO_NOTIFY)

    def enable_kicks(self) -> bool:
        """Implement :meth:`Virtqueue.enable_kicks`."""
        self._kicks = True
        self._arm()
        fence.full()
        return self._driver.load16(split.AVAIL_IDX_OFFSET) != self._avail

    def _arm(self) -> None:
        """Ask for a notification of the next buffer; store only fields that change."""
        if self._event_idx:
            at, value = split.avail_event_offset(self.size), self._avail
        else:
            at, value = 0, 0
        if self._device.load16(at) != value:
            self._device.store16(at, value)

    def state(self) -> RingState:
        """Implement :meth:`Virtqueue.state`."""
        return RingState(avail=self._avail, used=self._used)
