# SPDX-License-Identifier: Apache-2.0
"""Drivers that make a whole queue's worth of buffers available in a few array operations.

The tests' drivers say what they do one descriptor at a time; here the device is what is timed, and
the driver must not take longer than it.  Heads are handed out as Linux does after the first round:
the order is reversed each time, because freed descriptors go to the front of its list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from tests.fakes.memory import Arena

from vballoon.memory import GuestMemory
from vballoon.virtqueue import RingAddresses
from virtio_formats.virtio import features as f
from virtio_formats.virtio import packed, split

__all__ = ("FullRing", "make_load")

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 0x80, 0x8000


class FullRing(ABC):
    """Buffers of *parts* elements each; with *indirect* these are in a table of their own."""

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        features: int,
        arena: Arena,
        *,
        parts: int = 1,
        indirect: bool = False,
    ) -> None:
        self.memory, self.size, self.features = memory, size, features
        self.parts, self.indirect = parts, indirect
        self.slots = 1 if indirect else parts
        self.buffers = size // self.slots
        """Buffers of a full ring."""
        self.addresses = self._allocate(arena)
        if indirect:
            at = arena.take(16 * parts * self.buffers)
            self._tables = memory.window(at, 16 * parts * self.buffers)
            self._table_addr = at + 16 * parts * np.arange(self.buffers, dtype=np.uint64)

    @abstractmethod
    def _allocate(self, arena: Arena) -> RingAddresses:
        """Take the ring's areas from *arena*."""

    def fill(self, addr: np.ndarray, length: np.ndarray, *, writable: bool) -> None:
        """Make as many buffers available as there are in *addr* and *length* (n by parts)."""
        addr = np.asarray(addr, np.uint64).reshape(-1, self.parts)
        length = np.asarray(length, np.uint32).reshape(-1, self.parts)
        count = addr.shape[0]
        if not self.indirect:
            self._publish(addr, length, WRITE if writable else 0)
            return
        dtype = self._dtype()
        table = np.zeros((count, self.parts), dtype)
        table["addr"], table["len"] = addr, length
        table["flags"] = WRITE if writable else 0
        if dtype == split.VirtqDesc.dtype():
            table["flags"][:, :-1] |= NEXT
            table["next"][:, :-1] = np.arange(1, self.parts)
        self._tables[: table.nbytes] = table.reshape(-1).view(np.uint8)
        self._publish(
            self._table_addr[:count, None], np.full((count, 1), 16 * self.parts), INDIRECT
        )

    @abstractmethod
    def _dtype(self) -> np.dtype:
        """Of a descriptor."""

    @abstractmethod
    def _publish(self, addr: np.ndarray, length: np.ndarray, flags: int) -> None:
        """Write chains of ``addr.shape[1]`` descriptors, then make them visible."""

    @abstractmethod
    def wants_kick(self) -> bool:
        """Return whether the device wants a notification of the buffers filled last."""

    @abstractmethod
    def done(self) -> bool:
        """Whether everything came back."""

    @abstractmethod
    def drain(self) -> int:
        """See that everything came back; how many buffers."""

    @property
    @abstractmethod
    def bytes_per_buffer(self) -> int:
        """Bytes of the ring that one buffer has the device read and write."""


class FullSplit(FullRing):
    """A split ring."""

    def _allocate(self, arena: Arena) -> RingAddresses:
        n = self.size
        a = RingAddresses(
            arena.take(split.desc_size(n), 4096),
            arena.take(split.avail_size(n), 4096),
            arena.take(split.used_size(n), 4096),
        )
        self._desc = self.memory.window(a.desc, split.desc_size(n)).view(split.VirtqDesc.dtype())
        self._avail = self.memory.window(a.driver, split.avail_size(n)).view(np.uint16)
        self._used = self.memory.window(a.device, split.used_size(n)).view(np.uint16)
        self._ring = self._used[2 : 2 + 4 * n].view(split.VirtqUsedElem.dtype())
        self._idx = self._sent = 0
        self._backwards = False
        return a

    def _dtype(self) -> np.dtype:
        return split.VirtqDesc.dtype()

    def _publish(self, addr: np.ndarray, length: np.ndarray, flags: int) -> None:
        count, parts = addr.shape
        if self._backwards:  # through the table from the end, but still in the caller's order
            addr, length = addr[::-1], length[::-1]
        rows = self._desc[: count * parts]
        rows["addr"], rows["len"], rows["flags"] = addr.ravel(), length.ravel(), flags
        links = rows.reshape(count, parts)
        links["flags"][:, :-1] |= NEXT
        links["next"][:, :-1] = np.arange(count * parts).reshape(count, parts)[:, 1:]
        heads = np.arange(0, count * parts, parts, dtype=np.uint16)
        self._heads = heads[::-1] if self._backwards else heads
        self._backwards = not self._backwards
        at = (self._idx + np.arange(count)) % self.size
        self._avail[2 : 2 + self.size][at] = self._heads
        if f.has(self.features, f.VIRTIO_F_EVENT_IDX):
            self._avail[2 + self.size] = self._idx  # tell me of the first one
        self._from, self._sent = self._idx, count
        self._idx = (self._idx + count) & 0xFFFF
        self._avail[1] = self._idx

    def resume(self) -> None:
        """Go on where another process left the ring."""
        self._idx = int(self._avail[1])

    def wants_kick(self) -> bool:
        if not f.has(self.features, f.VIRTIO_F_EVENT_IDX):
            return not int(self._used[0]) & 1
        return (int(self._used[-1]) - self._from) & 0xFFFF < self._sent

    def done(self) -> bool:
        return int(self._used[1]) == self._idx

    def drain(self) -> int:
        assert int(self._used[1]) == self._idx, "not every buffer came back"
        at = (self._from + np.arange(self._sent)) % self.size
        assert (self._ring["id"][at] == self._heads).all(), "other buffers came back"
        return self._sent

    @property
    def bytes_per_buffer(self) -> int:
        table = 16 * self.parts if self.indirect else 0
        return 16 * self.slots + table + 2 + 8


class FullPacked(FullRing):
    """A packed ring; filled to its end every time, or in parts of any size."""

    def _allocate(self, arena: Arena) -> RingAddresses:
        a = RingAddresses(
            arena.take(16 * self.size, 4096), arena.take(4, 4096), arena.take(4, 4096)
        )
        self._rows = self.memory.window(a.desc, 16 * self.size).view(packed.PvirtqDesc.dtype())
        self._event = self.memory.window(a.driver, 4).view(np.uint16)
        self._suppress = self.memory.window(a.device, 4).view(np.uint16)
        self._at, self._wrap = 0, True
        return a

    def _dtype(self) -> np.dtype:
        return packed.PvirtqDesc.dtype()

    def _publish(self, addr: np.ndarray, length: np.ndarray, flags: int) -> None:
        count, parts = addr.shape
        total = count * parts
        place = self._at + np.arange(total)
        wrap = np.where(place < self.size, self._wrap, not self._wrap)
        place %= self.size
        word = np.where(wrap, AVAIL, USED).astype(np.uint16) | np.uint16(flags)
        links = word.reshape(count, parts)
        links[:, :-1] |= NEXT
        rows = np.zeros(total, self._dtype())
        rows["addr"], rows["len"] = addr.ravel(), length.ravel()
        rows["id"] = np.repeat(np.arange(count), parts)
        rows["flags"] = word
        self._rows[place] = rows
        self._heads, self._flags = place[::parts], wrap[::parts]
        self._sent = count
        if self._at + total >= self.size:
            self._wrap = not self._wrap
        self._at = (self._at + total) % self.size

    def wants_kick(self) -> bool:
        return int(self._suppress[1]) & 3 != 1

    def done(self) -> bool:
        flags = self._rows["flags"][self._heads]
        used = (flags & AVAIL != 0) & (flags & USED != 0)
        return bool((used == self._flags).all())

    def drain(self) -> int:
        flags = self._rows["flags"][self._heads]
        used = (flags & AVAIL != 0) & (flags & USED != 0)
        assert (used == self._flags).all(), "not every buffer came back"
        assert (self._rows["id"][self._heads] == np.arange(self._sent)).all()
        return self._sent

    @property
    def bytes_per_buffer(self) -> int:
        table = 16 * self.parts if self.indirect else 0
        return 16 * self.slots + table + 8


def make_load(memory: GuestMemory, size: int, features: int, arena: Arena, **how: Any) -> FullRing:
    """Return the driver for the ring format of *features*."""
    kind = FullPacked if f.has(features, f.VIRTIO_F_RING_PACKED) else FullSplit
    return kind(memory, size, features, arena, **how)
