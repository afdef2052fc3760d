# SPDX-License-Identifier: Apache-2.0
"""The driver side of a virtqueue, correct by default, with access to its raw memory.

The code follows the text of the standard (git revision 15f488c1), not the device's code: indices
are compared by listing the indices in between, not by modular arithmetic.  A test adds buffers
(:meth:`DriverRing.add`), makes them visible (:meth:`DriverRing.publish`), and reads what the device
used (:meth:`DriverRing.collect`).  Tests of bad drivers write to the raw views (``desc``,
``avail_ring`` and others).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tests.fakes.memory import Arena

from vballoon.memory import GuestMemory
from vballoon.virtqueue import RingAddresses
from virtio_formats.virtio import features as f
from virtio_formats.virtio import packed, split

NEXT, WRITE, INDIRECT = 1, 2, 4


class Element(NamedTuple):
    """One element of a buffer: guest-physical address, bytes, device-writable or not."""

    addr: int
    len: int
    writable: bool = False


class DriverRing(ABC):
    """The common part of both ring formats."""

    addresses: RingAddresses
    desc: NDArray[Any]
    """The descriptor table or the packed ring, as rows."""

    def __init__(self, memory: GuestMemory, size: int, features: int, arena: Arena) -> None:
        self.memory, self.size, self.features, self.arena = memory, size, features, arena
        self.event_idx = f.has(features, f.VIRTIO_F_EVENT_IDX)
        self.in_order = f.has(features, f.VIRTIO_F_IN_ORDER)
        self.outstanding: dict[int, tuple[Element, ...]] = {}
        """Available buffers that are not used yet, by head or buffer id, oldest first."""

    @abstractmethod
    def add(self, *elements: Element, indirect: bool = False) -> int:
        """Write a chain, not yet visible to the device, and return its head or buffer id."""

    @abstractmethod
    def publish(self) -> None:
        """Make everything added so far visible to the device."""

    @abstractmethod
    def should_kick(self) -> bool:
        """Return whether the device wants a notification of buffers published since last time."""

    @abstractmethod
    def collect(self) -> list[tuple[int, int]]:
        """Return the buffers used since the last call as (id, written bytes)."""

    @abstractmethod
    def interrupts(self, wanted: bool) -> None:
        """Enable or disable used buffer notifications (with event indices: for the next buffer)."""

    @property
    @abstractmethod
    def room(self) -> int:
        """Number of free descriptors."""

    def buffer(self, size: int, writable: bool = False) -> Element:
        """Return an element of newly allocated memory."""
        return Element(self.arena.take(size), size, writable)

    def _done(self, ident: int, length: int) -> list[tuple[int, int]]:
        """Return the buffers that one used element completes: with in-order, all older ones too."""
        assert ident in self.outstanding, f"buffer {ident} came back but was not outstanding"
        ids = list(self.outstanding)
        upto = ids.index(ident) if self.in_order else 0
        done = ids[:upto] if self.in_order else []
        return [(i, sum(e.len for e in self.outstanding[i] if e.writable)) for i in done] + [
            (ident, length)
        ]


class SplitDriver(DriverRing):
    """A split virtqueue; *start* is the value both indices begin with."""

    def __init__(
        self, memory: GuestMemory, size: int, features: int, arena: Arena, *, start: int = 0
    ) -> None:
        super().__init__(memory, size, features, arena)
        a = RingAddresses(
            desc=arena.take(split.desc_size(size), 16),
            driver=arena.take(split.avail_size(size), 2),
            device=arena.take(split.used_size(size), 4),
        )
        self.addresses = a
        zero(memory, a.desc, a.device + split.used_size(size))
        self.desc = memory.window(a.desc, split.desc_size(size)).view(split.VirtqDesc.dtype())
        self.avail = memory.window(a.driver, split.avail_size(size)).view(np.uint16)
        self.used = memory.window(a.device, split.used_size(size)).view(np.uint16)
        self.used_ring = self.used[2 : 2 + 4 * size].view(split.VirtqUsedElem.dtype())
        self.free = deque(range(size))
        self.next_avail = self.last_used = self.kicked = start
        self.avail[1] = self.used[1] = start
        if self.event_idx:
            self.avail[-1] = start  # used_event: notify for the first used buffer
            self.used[-1] = start
        self._chains: dict[int, list[int]] = {}

    @property
    def avail_ring(self) -> np.ndarray:
        """The available ring's heads (uint16[size])."""
        return self.avail[2 : 2 + self.size]

    @property
    def room(self) -> int:
        return len(self.free)

    def add(self, *elements: Element, indirect: bool = False) -> int:
        if indirect:
            table = self.arena.take(16 * len(elements), 1)
            self.write_table(table, elements)
            slots = [self.free.popleft()]
            self.desc[slots[0]] = (table, 16 * len(elements), INDIRECT, 0)
        else:
            slots = [self.free.popleft() for _ in elements]
            for i, (slot, e) in enumerate(zip(slots, elements, strict=True)):
                more = i + 1 < len(slots)
                self.desc[slot] = (*e[:2], link(e, more), slots[i + 1] if more else 0)
        return self.offer(slots, elements)

    def offer(self, slots: list[int], elements: tuple[Element, ...] = ()) -> int:
        """Put a chain that is already in the table, at *slots*, on the available ring."""
        head = slots[0]
        self.avail_ring[self.next_avail % self.size] = head
        self.next_avail = (self.next_avail + 1) % 65536
        self.outstanding[head], self._chains[head] = tuple(elements), slots
        return head

    def write_table(self, addr: int, elements: tuple[Element, ...]) -> None:
        """Write an indirect table at *addr*, in order."""
        table = np.zeros(len(elements), split.VirtqDesc.dtype())
        for i, e in enumerate(elements):
            more = i + 1 < len(elements)
            table[i] = (*e[:2], link(e, more), i + 1 if more else 0)
        self.memory.write(addr, table.tobytes())

    def publish(self) -> None:
        self.avail[1] = self.next_avail

    def should_kick(self) -> bool:
        old, self.kicked = self.kicked, int(self.avail[1])
        new = between(old, self.kicked)
        return bool(new) and (int(self.used[-1]) in new if self.event_idx else not self.used[0] & 1)

    def collect(self) -> list[tuple[int, int]]:
        done: list[tuple[int, int]] = []
        while self.last_used != int(self.used[1]):
            ident, length = self.used_ring[self.last_used % self.size].tolist()
            for one, size in self._done(ident, length):
                del self.outstanding[one]
                self.free.extend(self._chains.pop(one))
                self.last_used = (self.last_used + 1) % 65536
                done.append((one, size))
        return done

    def interrupts(self, wanted: bool) -> None:
        if self.event_idx:
            self.avail[-1] = (self.last_used if wanted else self.last_used - 1) % 65536
        else:
            self.avail[0] = 0 if wanted else 1


class PackedDriver(DriverRing):
    """A packed virtqueue."""

    def __init__(self, memory: GuestMemory, size: int, features: int, arena: Arena) -> None:
        super().__init__(memory, size, features | f.mask(f.VIRTIO_F_RING_PACKED), arena)
        a = RingAddresses(arena.take(16 * size, 16), arena.take(4, 4), arena.take(4, 4))
        self.addresses = a
        zero(memory, a.desc, a.device + 4)
        self.desc = memory.window(a.desc, 16 * size).view(packed.PvirtqDesc.dtype())
        self.driver_event = memory.window(a.driver, 4).view(np.uint16)
        self.device_event = memory.window(a.device, 4).view(np.uint16)
        self.free_ids = deque(range(size))
        self.room_left = size
        self.slot = self.used_slot = 0
        self.wrap = self.used_wrap = True
        self._slots: dict[int, int] = {}
        self._staged: list[tuple[int, int]] = []
        self._fresh: list[tuple[int, bool]] = []

    @property
    def room(self) -> int:
        return self.room_left

    def flags(self, e: Element | None = None, more: bool = False) -> int:
        """Return the flags of an available descriptor in the next slot."""
        return (link(e, more) if e else 0) | (0x80 if self.wrap else 0x8000)

    def add(self, *elements: Element, indirect: bool = False) -> int:
        ident = self.free_ids.popleft()
        if indirect:
            table = self.arena.take(16 * len(elements), 1)
            self.write_table(table, elements)
            rows = [(table, 16 * len(elements), INDIRECT)]
        else:
            last = len(elements) - 1
            rows = [(*e[:2], link(e, i < last)) for i, e in enumerate(elements)]
        self.write_list(rows, ident)
        self.outstanding[ident] = tuple(elements)
        return ident

    def write_list(self, rows: list[tuple[int, int, int]], ident: int) -> None:
        """Write descriptors (addr, len, flags without wrap bits) to the next slots, head not yet.

        Only the last descriptor has the buffer id; the others have a wrong one on purpose.
        """
        self._slots[ident] = len(rows)
        self.room_left -= len(rows)
        for i, (addr, size, flags) in enumerate(rows):
            flags |= self.flags()
            shown = int(self.desc[self.slot]["flags"]) if i == 0 else flags
            if i == 0:
                self._staged.append((self.slot, flags))
            self.desc[self.slot] = (addr, size, ident if i == len(rows) - 1 else ident ^ 1, shown)
            self._fresh.append((self.slot, self.wrap))
            self._advance()

    def _advance(self) -> None:
        self.slot += 1
        if self.slot == self.size:
            self.slot, self.wrap = 0, not self.wrap

    def write_table(self, addr: int, elements: tuple[Element, ...]) -> None:
        """Write an indirect table at *addr*; position is the order, NEXT and ids are ignored."""
        table = np.zeros(len(elements), packed.PvirtqDesc.dtype())
        for i, e in enumerate(elements):
            table[i] = (e.addr, e.len, 0, WRITE if e.writable else 0)
        self.memory.write(addr, table.tobytes())

    def publish(self) -> None:
        # The first descriptor of each list last, and the oldest list last of all: the device must
        # find either nothing or everything.
        for slot, flags in reversed(self._staged):
            self.desc["flags"][slot] = flags
        self._staged.clear()

    def should_kick(self) -> bool:
        fresh, self._fresh = self._fresh, []
        return bool(fresh) and wants_event(self.device_event, fresh, self.event_idx)

    def collect(self) -> list[tuple[int, int]]:
        done: list[tuple[int, int]] = []
        while True:
            row = self.desc[self.used_slot]
            flags = int(row["flags"])
            if bool(flags & 0x80) != self.used_wrap or bool(flags & 0x8000) != self.used_wrap:
                return done
            length = int(row["len"]) if flags & WRITE else 0
            for one, size in self._done(int(row["id"]), length):
                del self.outstanding[one]
                self._free(one)
                done.append((one, size))

    def _free(self, ident: int) -> None:
        slots = self._slots.pop(ident)
        self.free_ids.append(ident)
        self.room_left += slots
        self.used_slot += slots
        if self.used_slot >= self.size:
            self.used_slot, self.used_wrap = self.used_slot - self.size, not self.used_wrap

    def interrupts(self, wanted: bool) -> None:
        if wanted and self.event_idx:
            self.driver_event[0] = self.used_slot | self.used_wrap << 15
            self.driver_event[1] = 2
        else:
            self.driver_event[1] = 0 if wanted else 1


def link(e: Element, more: bool) -> int:
    """Return the NEXT and WRITE flags of an element."""
    return (NEXT if more else 0) | (WRITE if e.writable else 0)


def zero(memory: GuestMemory, start: int, end: int) -> None:
    """Clear the areas of a ring, as a driver does when it allocates them."""
    memory.write(start, bytes(end - start))


def between(old: int, new: int) -> list[int]:
    """Return the 16-bit indices from *old* up to, not including, *new*."""
    return [i % 65536 for i in range(old, old + (new - old) % 65536)]


def wants_event(event: np.ndarray, slots: list[tuple[int, bool]], event_idx: bool) -> bool:
    """Return whether an event suppression structure asks for a notification of *slots*."""
    mode = int(event[1]) & 3
    if mode == 2 and event_idx:
        return (int(event[0]) & 0x7FFF, bool(int(event[0]) >> 15)) in slots
    return mode != 1


def make_driver(
    memory: GuestMemory, size: int, features: int = 0, *, arena: Arena | None = None, start: int = 0
) -> DriverRing:
    """Return the driver for the ring format of *features*, with its areas in *arena*."""
    arena = arena or Arena(0x10000, memory.regions[0].size - 0x10000)
    if f.has(features, f.VIRTIO_F_RING_PACKED):
        return PackedDriver(memory, size, features, arena)
    return SplitDriver(memory, size, features, arena, start=start)
