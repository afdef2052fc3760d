# SPDX-License-Identifier: Apache-2.0
"""The packed virtqueue, one descriptor at a time, for every kind of memory.

Guest data is fetched once: each descriptor is copied, and only the copy is used.  Labels are
those of the virtio specification, git revision 15f488c1, under "Packed Virtqueues".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vballoon.errors import QueueError
from vballoon.memory import fence
from vballoon.virtqueue import rules
from vballoon.virtqueue.areas import Area
from vballoon.virtqueue.base import RingState
from vballoon.virtqueue.chain import Chain, check_indirect_table
from vballoon.virtqueue.ring import Ring
from virtio_formats.virtio import packed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from vballoon.memory import GuestMemory
    from vballoon.virtqueue.base import RingAddresses
    from vballoon.virtqueue.inflight import InflightLog, Resubmit

__all__ = ("ScalarPacked",)

_DESC = packed.PvirtqDesc.SIZE
_LEN, _ID, _FLAGS = 8, 12, 14  # offsets in the descriptor
_BOTH = packed.VIRTQ_DESC_F_AVAIL | packed.VIRTQ_DESC_F_USED
_EVENT_DESC, _EVENT_FLAGS = 0, 2  # offsets in the event suppression structure


class ScalarPacked(Ring):
    """The device side of a packed virtqueue."""

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
        if not 0 < size <= packed.QUEUE_SIZE_MAX:
            raise QueueError(rules.RING_SIZE, f"{size}")
        if not (0 <= state.avail < size and 0 <= state.used < size):
            raise QueueError(rules.RING_SIZE, f"{state} in a ring of {size}")
        super().__init__(memory, size, features, inflight=inflight, resubmit=resubmit)
        # Used descriptors are written to the descriptor ring, so its writes are logged.
        log_ring = None if dirty_ring is None else addresses.desc
        self._desc = Area(
            memory, addresses.desc, packed.ring_size(size), packed.RING_ALIGN, log_ring
        )
        event = packed.PvirtqEventSuppress.SIZE
        self._driver = Area(memory, addresses.driver, event, packed.EVENT_ALIGN)
        self._device = Area(memory, addresses.device, event, packed.EVENT_ALIGN, dirty_ring)
        self._avail, self._avail_wrap = state.avail, state.avail_wrap
        self._used, self._used_wrap = state.used, state.used_wrap
        self._signalled = (self._used, self._used_wrap)
        self._arm()

    def state(self) -> RingState:
        """Implement :meth:`Virtqueue.state`."""
        return RingState(self._avail, self._used, self._avail_wrap, self._used_wrap)

    def _step(self, slot: int, wrap: bool, slots: int) -> tuple[int, bool]:
        """Return the position *slots* later (label: … / Driver and Device Ring Wrap Counters)."""
        slot += slots
        return (slot - self.size, not wrap) if slot >= self.size else (slot, wrap)

    # taking

    def _walk_available(self, limit: int) -> Iterator[Chain]:
        slot, wrap = self._avail, self._avail_wrap
        for _ in range(limit):
            rows = self._list_at(slot, wrap)
            if not rows:
                return
            yield self._chain_of(rows)
            slot, wrap = self._step(slot, wrap, len(rows))

    def _consume(self, buffers: int, slots: int) -> None:
        self._avail, self._avail_wrap = self._step(self._avail, self._avail_wrap, slots)

    def _raw(self, chains: list[Chain]) -> NDArray[Any]:
        return np.frombuffer(b"".join(c.ring for c in chains), packed.PvirtqDesc.dtype())

    def _list_at(self, slot: int, wrap: bool) -> list[packed.PvirtqDesc]:
        """Return the descriptors of the list at *slot*; none if its first is not available.

        The driver makes the first descriptor available last, so it is checked first.  A list that
        continues in a descriptor which is not available is an error
        (label: … / Next Flag: Descriptor Chaining).
        """
        flags = self._desc.load16(_DESC * slot + _FLAGS)
        if not _available(flags, wrap):
            return []
        # The rest of the descriptor is read after its flags (label: … / Updating flags).
        fence.acquire()
        rows = [self._fetch(slot)]
        rows[0].flags = flags
        while rows[-1].flags & packed.VIRTQ_DESC_F_NEXT:
            if len(rows) == self.size:
                raise QueueError(rules.CHAIN_TOO_LONG, f"more than {self.size} descriptors")
            slot, wrap = self._step(slot, wrap, 1)
            rows.append(self._fetch(slot))
            if not _available(rows[-1].flags, wrap):
                raise QueueError(rules.DESC_NOT_AVAILABLE, f"slot {slot}")
        return rows

    def _fetch(self, slot: int) -> packed.PvirtqDesc:
        return packed.PvirtqDesc.parse(self._desc.load(_DESC * slot, _DESC))

    def _chain_of(self, rows: list[packed.PvirtqDesc]) -> Chain:
        """Return the buffer of the ring's descriptors *rows*, with every rule checked.

        The buffer id is that of the last descriptor (label: … / Next Flag: Descriptor Chaining).
        """
        chain = Chain(self._memory, self.size, id=rows[-1].id, slots=len(rows))
        chain.ring = b"".join(row.build() for row in rows)
        if self._is_busy(chain.id):
            raise QueueError(rules.BUFFER_REUSED, f"buffer id {chain.id}")
        if any(row.flags & packed.VIRTQ_DESC_F_INDIRECT for row in rows):
            if self._indirect and len(rows) > 1:
                raise QueueError(rules.INDIRECT_WITH_NEXT)
            self._add_table(chain, rows[0])
        else:
            for row in rows:
                chain.add(row.addr, row.len, bool(row.flags & packed.VIRTQ_DESC_F_WRITE))
        return chain

    def _add_table(self, chain: Chain, row: packed.PvirtqDesc) -> None:
        """Add all elements of an indirect table, in the table's order.

        Only its WRITE flag is used (label: … / Indirect Flag: Scatter-Gather Support).
        """
        count = check_indirect_table(self._memory, self._indirect, row.addr, row.len)
        if count > self.size:
            raise QueueError(rules.CHAIN_TOO_LONG, f"{count} descriptors")
        table = self._memory.read(row.addr, row.len)
        for at in range(0, row.len, _DESC):
            entry = packed.PvirtqDesc.parse(table[at : at + _DESC])
            chain.add(entry.addr, entry.len, bool(entry.flags & packed.VIRTQ_DESC_F_WRITE))

    # buffers of an earlier back-end

    def _earlier(self, resubmit: Resubmit) -> Iterable[list[packed.PvirtqDesc]]:
        """Return the descriptors in the record, because those in the ring may be overwritten."""
        if resubmit.slots is None or resubmit.ring is None or 0 in resubmit.slots:
            raise QueueError(rules.RING_SIZE, "an in-flight record without descriptors")
        data, at = resubmit.ring.tobytes(), 0
        for count in resubmit.slots.tolist():
            rows = [data[i : i + _DESC] for i in range(at, at + count * _DESC, _DESC)]
            if len(rows[-1]) != _DESC:
                raise QueueError(rules.RING_SIZE, "a truncated in-flight record")
            at += count * _DESC
            yield [packed.PvirtqDesc.parse(row) for row in rows]

    def _walk_again(self, entry: list[packed.PvirtqDesc]) -> Chain:
        return self._chain_of(entry)

    # giving

    def _write_used(
        self, ids: NDArray[np.uint16], written: NDArray[np.uint32], slots: NDArray[np.uint16]
    ) -> Callable[[], None]:
        """Write one used descriptor for each buffer, where the list of the previous one ended.

        The publishing store writes the flags of the first one: the driver reads no other
        before it (label: … / Polling of available and used descriptors).
        """
        start, first = self._used, _used_flags(self._used_wrap, int(written[0]))
        slot, wrap = self._used, self._used_wrap
        for ident, length, count in zip(
            ids.tolist(), written.tolist(), slots.tolist(), strict=True
        ):
            row = packed.PvirtqDesc(addr=0, len=length, id=ident, flags=0).build()
            self._desc.store(_DESC * slot + _LEN, row[_LEN:_FLAGS])
            if slot != start:
                self._desc.store16(_DESC * slot + _FLAGS, _used_flags(wrap, length))
            slot, wrap = self._step(slot, wrap, count)
        self._used, self._used_wrap = slot, wrap
        return lambda: self._desc.store16(_DESC * start + _FLAGS, first)

    # notifications

    def should_notify(self) -> bool:
        """Implement :meth:`Virtqueue.should_notify` (… / Driver and Device Event Suppression)."""
        new = (self._used, self._used_wrap)
        old, self._signalled = self._signalled, new
        if self._notify_anyway:
            self._notify_anyway = False
            return True
        if new == old:
            return False
        fence.full()
        mode = self._driver.load16(_EVENT_FLAGS) & packed.EVENT_FLAGS_MASK
        if mode != packed.RING_EVENT_FLAGS_DESC or not self._event_idx:
            return mode != packed.RING_EVENT_FLAGS_DISABLE
        fence.acquire()  # the driver stores the position before the mode
        event = self._driver.load16(_EVENT_DESC)
        at = (event & packed.EVENT_OFFSET_MASK, bool(event >> packed.EVENT_WRAP_SHIFT))
        return self._distance(old, at) < self._distance(old, new)

    def _distance(self, old: tuple[int, bool], new: tuple[int, bool]) -> int:
        """Return the slots from *old* forward to *new*, modulo two rounds of the ring."""
        ahead = new[0] - old[0] + (0 if new[1] == old[1] else self.size)
        return ahead % (2 * self.size)

    def disable_kicks(self) -> None:
        """Implement :meth:`Virtqueue.disable_kicks`."""
        self._kicks = False
        self._device.store16(_EVENT_FLAGS, packed.RING_EVENT_FLAGS_DISABLE)

    def enable_kicks(self) -> bool:
        """Implement :meth:`Virtqueue.enable_kicks`."""
        self._kicks = True
        self._arm()
        fence.full()
        flags = self._desc.load16(_DESC * self._avail + _FLAGS)
        return _available(flags, self._avail_wrap)

    def _arm(self) -> None:
        """Ask for a notification of the next buffer: store the position, then the mode."""
        mode = packed.RING_EVENT_FLAGS_ENABLE
        if self._event_idx:
            mode = packed.RING_EVENT_FLAGS_DESC
            event = self._avail | self._avail_wrap << packed.EVENT_WRAP_SHIFT
            if self._device.load16(_EVENT_DESC) != event:
                self._device.store16(_EVENT_DESC, event)
                fence.release()
        if self._device.load16(_EVENT_FLAGS) != mode:
            self._device.store16(_EVENT_FLAGS, mode)


def _available(flags: int, wrap: bool) -> bool:
    """Return whether AVAIL equals the wrap counter and USED does not (… / Driver and Device …)."""
    return flags & _BOTH == (packed.VIRTQ_DESC_F_AVAIL if wrap else packed.VIRTQ_DESC_F_USED)


def _used_flags(wrap: bool, written: int) -> int:
    """Return flags with AVAIL and USED equal to the wrap counter, and WRITE if data was written."""
    return (_BOTH if wrap else 0) | (packed.VIRTQ_DESC_F_WRITE if written else 0)
