# SPDX-License-Identifier: Apache-2.0
"""Driver side of the split virtqueue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from virtio_conformance.findings import Finding
from virtio_conformance.memory import GuestRam
from virtio_conformance.ring import DriverRing, Segment, Used, full_fence
from virtio_formats.virtio import split

__all__ = ("SplitRing", "build_table")

NEXT, WRITE, INDIRECT = (
    split.VIRTQ_DESC_F_NEXT,
    split.VIRTQ_DESC_F_WRITE,
    split.VIRTQ_DESC_F_INDIRECT,
)


def build_table(segments: Sequence[Segment]) -> bytes:
    """Return an indirect table (split layout) of these segments, chained in order."""
    last = len(segments) - 1
    return b"".join(
        split.VirtqDesc(
            addr=s.addr,
            len=s.len,
            flags=(WRITE if s.write else 0) | (NEXT if i < last else 0),
            next=i + 1 if i < last else 0,
        ).build()
        for i, s in enumerate(segments)
    )


class SplitRing(DriverRing):
    """Descriptor table, available ring and used ring, each in an allocation of its own."""

    packed = False

    def __init__(
        self, ram: GuestRam, size: int, *, event_idx: bool = False, start: int = 0, region: int = 0
    ) -> None:
        super().__init__(ram, size, event_idx=event_idx)
        self.desc_addr = ram.alloc(split.desc_size(size), 4096, region)
        self.avail_addr = ram.alloc(split.avail_size(size), 4096, region)
        self.used_addr = ram.alloc(split.used_size(size), 4096, region)
        self.areas = (self.desc_addr, self.avail_addr, self.used_addr)
        self.desc = _table(ram, self.desc_addr, size)
        self.avail = _words(ram, self.avail_addr, split.avail_size(size) // 2)
        self.used_words = _words(ram, self.used_addr, split.used_size(size) // 2)
        self.elements = _elements(ram, self.used_addr + split.USED_RING_OFFSET, size)
        self.reset(start)

    def reset(self, start: int = 0) -> None:
        """Clear all areas and begin at index *start*, in both rings."""
        self.desc[:] = 0
        self.avail[:] = 0
        self.used_words[:] = 0
        self.avail[1] = self.used_words[1] = start & 0xFFFF
        self.avail_idx = self.last_used = start & 0xFFFF
        self.published = self.avail_idx
        self.kicked = self.avail_idx
        self.free = list(range(self.size - 1, -1, -1))
        self.chains: dict[int, list[int]] = {}
        self.lengths.clear()

    # -- any values -------------------------------------------------------------------------

    def write_desc(self, slot: int, addr: int, length: int, flags: int = 0, next: int = 0) -> None:
        """Write one descriptor with any values."""
        self.desc[slot] = (addr, length, flags, next)

    def offer_head(self, head: int) -> None:
        """Write *head*, any 16-bit value, to the available ring; publishing makes it visible."""
        self.avail[2 + self.avail_idx % self.size] = head & 0xFFFF
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF

    def set_avail_idx(self, value: int) -> None:
        """Write any value to the available index."""
        full_fence()
        self.avail[1] = value & 0xFFFF

    @property
    def used_idx(self) -> int:
        """The device's used index."""
        return int(self.used_words[1])

    @property
    def used_flags(self) -> int:
        """The used ring's flags."""
        return int(self.used_words[0])

    @property
    def avail_event(self) -> int:
        """The index at which the device wants to be notified (EVENT_IDX)."""
        return int(self.used_words[split.avail_event_offset(self.size) // 2])

    def set_used_event(self, value: int) -> None:
        """Write used_event: the index whose use is to be notified (EVENT_IDX)."""
        self.avail[split.used_event_offset(self.size) // 2] = value & 0xFFFF

    def set_avail_flags(self, value: int) -> None:
        """Write the flags of the available ring."""
        self.avail[0] = value & 0xFFFF

    # -- as a correct driver does ------------------------------------------------------------

    def add(self, segments: Sequence[Segment], *, indirect: int = 0, publish: bool = True) -> int:
        """Make a buffer available with one descriptor for each segment, and return its head."""
        shown = segments
        if indirect:
            self.ram.write(indirect, build_table(segments))
            segments = [Segment(indirect, 16 * len(segments))]
        slots = [self.free.pop() for _ in segments]
        for i, (slot, s) in enumerate(zip(slots, segments, strict=True)):
            more = i + 1 < len(slots)
            flags = (WRITE if s.write else 0) | (NEXT if more else 0)
            flags |= INDIRECT if indirect else 0
            self.write_desc(slot, s.addr, s.len, flags, slots[i + 1] if more else 0)
        self.chains[slots[0]] = slots
        self.lengths[slots[0]] = len(slots)
        self.remember(slots[0], shown, indirect)
        self.offer_head(slots[0])
        if publish:
            self.publish()
        return slots[0]

    def publish(self) -> None:
        """Make all added buffers visible to the device."""
        self.published = self.avail_idx
        self.set_avail_idx(self.avail_idx)

    def poll(self) -> list[Used]:
        """Return the buffers that the device returned since the last call."""
        found: list[Used] = []
        now = self.used_idx
        if (now - self.last_used) & 0xFFFF > self.size:
            raise Finding(f"used index {now}, last seen {self.last_used}, queue size {self.size}")
        while self.last_used != now:
            element = self.elements[self.last_used % self.size]
            head = int(element["id"])
            if head >= self.size:
                raise Finding(f"used element names head {head} of {self.size}")
            self.last_used = (self.last_used + 1) & 0xFFFF
            found.append(self.take_back(Used(head, int(element["len"]))))
            self.free += reversed(self.chains.pop(head, []))
        return found

    def used_count(self) -> int:
        """Return how far the used index is ahead of the driver."""
        return (self.used_idx - self.last_used) & 0xFFFF

    def state(self) -> list[str]:
        """Return the indices, flags and used elements, as lines of text."""
        now = self.used_idx
        recent = range(max(now - 4, 0), now) if now >= 4 else range(now)
        entries = [self.elements[at % self.size] for at in recent]
        return [
            (
                f"available index {int(self.avail[1])}, used index {now}, the driver has seen"
                f" {self.last_used}; used flags {self.used_flags}"
            ),
            *(
                f"used element {at}: id {e['id']} len {e['len']}"
                for at, e in zip(recent, entries, strict=True)
            ),
        ]

    def wants_kick(self) -> bool:
        """Return whether the device wants a notification."""
        full_fence()
        old, self.kicked = self.kicked, self.published
        if not self.event_idx:
            return not self.used_flags & split.VIRTQ_USED_F_NO_NOTIFY
        passed = (self.published - self.avail_event - 1) & 0xFFFF
        return passed < (self.published - old) & 0xFFFF

    def interrupts(self, mode: str, after: int = 0) -> None:
        """Set used_event or the available ring's flags."""
        if self.event_idx:
            place = {"on": self.last_used, "off": self.last_used - 1}
            self.set_used_event(place.get(mode, self.last_used + after))
        else:
            self.set_avail_flags(split.VIRTQ_AVAIL_F_NO_INTERRUPT if mode == "off" else 0)
        full_fence()

    @property
    def base(self) -> int:
        """The correct answer to GET_VRING_BASE."""
        return self.published

    @property
    def device_span(self) -> list[tuple[int, int]]:
        """Address ranges that the device may write."""
        return [(self.used_addr, self.used_addr + split.used_size(self.size))]

    @property
    def publish_span(self) -> list[tuple[int, int]]:
        """The available index."""
        return [(self.avail_addr + 2, self.avail_addr + 4)]


def _table(ram: GuestRam, addr: int, size: int) -> NDArray[np.void]:
    region = ram.region_at(addr)
    offset = region.offset + addr - region.guest
    return np.frombuffer(region.view, split.VirtqDesc.dtype(), size, offset)


def _elements(ram: GuestRam, addr: int, size: int) -> NDArray[np.void]:
    region = ram.region_at(addr)
    offset = region.offset + addr - region.guest
    return np.frombuffer(region.view, split.VirtqUsedElem.dtype(), size, offset)


def _words(ram: GuestRam, addr: int, count: int) -> NDArray[np.uint16]:
    region = ram.region_at(addr)
    offset = region.offset + addr - region.guest
    return np.frombuffer(region.view, np.dtype("<u2"), count, offset)
