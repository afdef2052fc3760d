# SPDX-License-Identifier: Apache-2.0
"""Driver side of the packed virtqueue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from virtio_conformance.findings import Finding
from virtio_conformance.memory import GuestRam
from virtio_conformance.ring import DriverRing, Segment, Used, full_fence
from virtio_formats.virtio import packed

__all__ = ("PackedRing", "build_packed_table")

NEXT, WRITE, INDIRECT = (
    packed.VIRTQ_DESC_F_NEXT,
    packed.VIRTQ_DESC_F_WRITE,
    packed.VIRTQ_DESC_F_INDIRECT,
)
AVAIL, USED = packed.VIRTQ_DESC_F_AVAIL, packed.VIRTQ_DESC_F_USED


def build_packed_table(segments: Sequence[Segment]) -> bytes:
    """Return an indirect table (packed layout); of the flags only WRITE has a meaning in it."""
    return b"".join(
        packed.PvirtqDesc(addr=s.addr, len=s.len, id=0, flags=WRITE if s.write else 0).build()
        for s in segments
    )


class PackedRing(DriverRing):
    """One descriptor ring and two event suppression structures."""

    packed = True

    def __init__(
        self, ram: GuestRam, size: int, *, event_idx: bool = False, start: int = 0, region: int = 0
    ) -> None:
        super().__init__(ram, size, event_idx=event_idx)
        self.ring_addr = ram.alloc(packed.ring_size(size), 4096, region)
        self.driver_addr = ram.alloc(4, 4096, region)
        self.device_addr = ram.alloc(4, 4096, region)
        self.areas = (self.ring_addr, self.driver_addr, self.device_addr)
        place = ram.region_at(self.ring_addr)
        offset = place.offset + self.ring_addr - place.guest
        self.desc = np.frombuffer(place.view, packed.PvirtqDesc.dtype(), size, offset)
        shift = self.driver_addr - self.ring_addr
        self.driver_event = np.frombuffer(place.view, np.dtype("<u2"), 2, offset + shift)
        shift = self.device_addr - self.ring_addr
        self.device_event = np.frombuffer(place.view, np.dtype("<u2"), 2, offset + shift)
        self.reset(start)

    def reset(self, start: int = 0) -> None:
        """Clear the ring and begin in slot *start*; descriptors after it belong to no round."""
        self.desc[:] = 0
        self.driver_event[:] = self.device_event[:] = 0
        self.next_slot = self.used_slot = start
        self.wrap = self.used_wrap = 1
        self.ids = list(range(self.size - 1, -1, -1))
        self.heads: list[tuple[int, int]] = []
        self.writes: dict[int, bool] = {}
        self.kicked = (start, 1)
        self.lengths.clear()

    # -- any values -------------------------------------------------------------------------

    def available(self, wrap: int) -> int:
        """Return the flag bits of an available descriptor in a round with this wrap counter."""
        return AVAIL if wrap else USED

    def write_slot(self, slot: int, addr: int, length: int, id: int, flags: int) -> None:
        """Write one descriptor with any values, its flags last."""
        entry = self.desc[slot]
        entry["addr"], entry["len"], entry["id"] = addr, length, id
        full_fence()
        self.desc["flags"][slot] = flags & 0xFFFF

    def advance(self, count: int) -> None:
        """Advance the driver's next slot by *count*, past the end of the ring if necessary."""
        self.next_slot += count
        if self.next_slot >= self.size:
            self.next_slot -= self.size
            self.wrap ^= 1

    # -- as a correct driver does ------------------------------------------------------------

    def add(self, segments: Sequence[Segment], *, indirect: int = 0, publish: bool = True) -> int:
        """Make a buffer available with one descriptor for each segment, and return its id."""
        writes = any(s.write for s in segments)
        shown = segments
        if indirect:
            self.ram.write(indirect, build_packed_table(segments))
            segments = [Segment(indirect, 16 * len(segments))]
        name = self.ids.pop()
        self.writes[name] = writes
        head, head_flags = self.next_slot, 0
        slot, wrap = self.next_slot, self.wrap
        for i, s in enumerate(segments):
            flags = self.available(wrap) | (WRITE if s.write else 0)
            flags |= (NEXT if i + 1 < len(segments) else 0) | (INDIRECT if indirect else 0)
            if i:
                self.write_slot(slot, s.addr, s.len, name, flags)
            else:
                self.write_slot(slot, s.addr, s.len, name, int(self.desc["flags"][slot]))
                head_flags = flags
            slot, wrap = (slot + 1, wrap) if slot + 1 < self.size else (0, wrap ^ 1)
        # ids of all but the last element are ignored by the standard: make them wrong
        if len(segments) > 1:
            for i in range(len(segments) - 1):
                self.desc["id"][(head + i) % self.size] = 0xFFFF
        self.heads.append((head, head_flags))
        self.advance(len(segments))
        self.lengths[name] = len(segments)
        self.remember(name, shown, indirect)
        if publish:
            self.publish()
        return name

    def publish(self) -> None:
        """Write the flags of the heads, the last one first, so that the batch appears at once."""
        for head, flags in reversed(self.heads):
            full_fence()
            self.desc["flags"][head] = flags
        self.heads.clear()

    def poll(self) -> list[Used]:
        """Return the buffers that the device returned since the last call."""
        found: list[Used] = []
        while self.lengths:
            flags = int(self.desc["flags"][self.used_slot])
            if bool(flags & AVAIL) != bool(self.used_wrap):
                break
            if bool(flags & USED) != bool(self.used_wrap):
                break
            full_fence()
            entry = self.desc[self.used_slot]
            name = int(entry["id"])
            length = int(entry["len"]) if flags & WRITE else 0
            count = self.lengths.get(name)
            if count is None:
                raise Finding(
                    f"slot {self.used_slot} used with id {name}, which is not with the device"
                )
            if flags & WRITE and not self.writes[name]:
                raise Finding(f"buffer {name} is marked as written, but nothing can be written")
            found.append(self.take_back(Used(name, length)))
            self.ids.append(name)
            self.used_slot += count
            if self.used_slot >= self.size:
                self.used_slot -= self.size
                self.used_wrap ^= 1
        return found

    def used_count(self) -> int:
        """Return 1 if the next descriptor is used, else 0."""
        flags = int(self.desc["flags"][self.used_slot])
        return int(bool(flags & AVAIL) == bool(flags & USED) == bool(self.used_wrap))

    def state(self) -> list[str]:
        """Return the driver's position and the descriptors from there, as lines of text."""
        slots = [(self.used_slot + i) % self.size for i in range(min(6, self.size))]
        return [
            (
                f"next slot {self.next_slot} (wrap {self.wrap}), used slot {self.used_slot}"
                f" (wrap {self.used_wrap}); device event {self.device_event.tolist()}"
            ),
            *(f"slot {slot}: {_words(self.desc[slot])}" for slot in slots),
        ]

    def wants_kick(self) -> bool:
        """Return whether the device wants a notification."""
        full_fence()
        old, self.kicked = self.kicked, (self.next_slot, self.wrap)
        flags = int(self.device_event[1]) & packed.EVENT_FLAGS_MASK
        if flags != packed.RING_EVENT_FLAGS_DESC:
            return flags == packed.RING_EVENT_FLAGS_ENABLE
        word = int(self.device_event[0])
        event, wrap = word & packed.EVENT_OFFSET_MASK, word >> packed.EVENT_WRAP_SHIFT
        new, before = self.next_slot, old[0]
        if wrap != self.wrap:
            event -= self.size
        if old[1] != self.wrap:
            before -= self.size
        return before <= event < new

    def interrupts(self, mode: str, after: int = 0) -> None:
        """Set the driver's event suppression structure."""
        if mode == "event":
            slot, wrap = self.used_slot + after, self.used_wrap
            if slot >= self.size:
                slot, wrap = slot - self.size, wrap ^ 1
            self.driver_event[0] = slot | wrap << packed.EVENT_WRAP_SHIFT
            self.driver_event[1] = packed.RING_EVENT_FLAGS_DESC
        else:
            off = mode == "off"
            self.driver_event[1] = (
                packed.RING_EVENT_FLAGS_DISABLE if off else packed.RING_EVENT_FLAGS_ENABLE
            )
        full_fence()

    @property
    def base(self) -> int:
        """The correct answer to GET_VRING_BASE, without the used half."""
        return self.next_slot | self.wrap << 15

    @property
    def device_span(self) -> list[tuple[int, int]]:
        """Address ranges that the device may write."""
        ring_end = self.ring_addr + packed.ring_size(self.size)
        return [(self.ring_addr, ring_end), (self.device_addr, self.device_addr + 4)]

    @property
    def publish_span(self) -> list[tuple[int, int]]:
        """The ring, where the heads' flags are."""
        return [(self.ring_addr, self.ring_addr + packed.ring_size(self.size))]


def _words(entry: np.void) -> str:
    addr, length, flags = int(entry["addr"]), int(entry["len"]), int(entry["flags"])
    return f"addr {addr:#x} len {length} id {entry['id']} flags {flags:#06x}"
