# SPDX-License-Identifier: Apache-2.0
"""One area of a ring (descriptor, driver or device area), in any kind of memory.

Fields that the driver may change concurrently are 16 bits wide and naturally aligned.
:meth:`Area.load16` and :meth:`Area.store16` access them with one aligned native load or store, so
that no torn value is read.  (NumPy's item access on an aligned uint16 array is one typed C load or
store.  Hosts must be little-endian, so that the guest's byte order is the native one.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vballoon.errors import MemoryFault, QueueError
from vballoon.virtqueue import rules

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vballoon.memory import GuestMemory

__all__ = ("Area",)


class Area:
    """*size* bytes of guest memory at *addr*, part of a ring.

    ``bytes`` (uint8[size]) and ``words`` (uint16[size / 2]) are the mapping, or None if the area
    is reached by messages or spans two mappings.  Raise :class:`~vballoon.errors.QueueError`
    ``ring-address`` for an area that is misaligned or not entirely in guest memory.  With
    *log_addr*, every store is marked in the memory's dirty log at that guest-physical address.
    """

    def __init__(
        self, memory: GuestMemory, addr: int, size: int, align: int, log_addr: int | None = None
    ) -> None:
        if addr % align or not memory.holds(addr, size):
            raise QueueError(rules.RING_ADDRESS, f"{addr:#x}+{size:#x}, alignment {align}")
        self.addr = addr
        self.size = size
        self._memory = memory
        self._log_addr = log_addr
        self.bytes: NDArray[np.uint8] | None = None
        self.words: NDArray[np.uint16] | None = None
        try:
            self.bytes = memory.window(addr, size)
            self.words = self.bytes[: size & ~1].view(np.uint16)
        except MemoryFault:
            pass  # no single mapping: every access goes through the memory table

    def load16(self, offset: int) -> int:
        """Return the 16-bit field at *offset* bytes."""
        if self.words is not None:
            return int(self.words.item(offset >> 1))
        return int.from_bytes(self._memory.read(self.addr + offset, 2), "little")

    def store16(self, offset: int, value: int) -> None:
        """Set the 16-bit field at *offset* bytes."""
        if self.words is not None:
            self.words[offset >> 1] = value
        else:
            self._memory.write(self.addr + offset, value.to_bytes(2, "little"))
        self.mark(offset, 2)

    def load(self, offset: int, size: int) -> bytes:
        """Return a private copy of *size* bytes at *offset*."""
        if self.bytes is not None:
            return self.bytes[offset : offset + size].tobytes()
        return self._memory.read(self.addr + offset, size)

    def store(self, offset: int, data: bytes) -> None:
        """Store *data* at *offset*."""
        if self.bytes is not None:
            self.bytes[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        else:
            self._memory.write(self.addr + offset, data)
        self.mark(offset, len(data))

    def mark(self, offset: int, size: int) -> None:
        """Mark these bytes in the dirty log, if ring writes are logged."""
        if size and self._log_addr is not None and self._memory.dirty_log is not None:
            self._memory.dirty_log.mark(self._log_addr + offset, size)
