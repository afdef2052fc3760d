# SPDX-License-Identifier: Apache-2.0
"""Guest memory made of the DMA map of a vfio-user client.

Regions that came with a file are mapped; the others (the client's ROMs and frame buffers, and all
of RAM that it does not share) are reached by DMA_READ and DMA_WRITE.
"""

from __future__ import annotations

import os

from vballoon.errors import MemoryFault, ProtocolError
from vballoon.memory import DirtyLog, GuestMemory, MemoryRegion
from vfio_user import DmaError, DmaRegion, DmaTable, RequestError

__all__ = ("ClientMemory",)

_EINVAL = 22


class RemotePages:
    """:class:`~vballoon.memory.RemoteMemory` on the messages of a DMA table."""

    def __init__(self, dma: DmaTable) -> None:
        self._dma = dma
        self.quiet = False
        """The device is being reset: no message may be sent from here."""

    def dma_read(self, addr: int, size: int) -> bytes:
        """*size* bytes at *addr*; raises :class:`~vballoon.errors.MemoryFault`."""
        self._check()
        try:
            return self._dma.read(addr, size)
        except DmaError as error:
            raise MemoryFault("dma-refused", str(error)) from None

    def dma_write(self, addr: int, data: bytes) -> None:
        """Store *data* at *addr*; raises :class:`~vballoon.errors.MemoryFault`."""
        self._check()
        try:
            self._dma.write(addr, data)
        except DmaError as error:
            raise MemoryFault("dma-refused", str(error)) from None

    def _check(self) -> None:
        if self.quiet:
            raise MemoryFault("dma-refused", "the device is being reset")


class ClientMemory:
    """The table of guest memory, kept in step with a DMA map."""

    def __init__(self, dma: DmaTable) -> None:
        self.remote = RemotePages(dma)
        self.table = GuestMemory()
        self.stale = False
        """Whether :attr:`table` is no longer what the client has mapped."""
        self._regions: dict[int, MemoryRegion] = {}

    def add(self, region: DmaRegion) -> None:
        """A region was mapped; raises :class:`~vfio_user.RequestError` if it cannot be used."""
        try:
            self._regions[region.address] = self._make(region)
        except ProtocolError as error:
            raise RequestError(_EINVAL, str(error)) from None
        self.stale = True

    def _make(self, region: DmaRegion) -> MemoryRegion:
        if region.fd is None:
            return MemoryRegion(
                guest_phys_addr=region.address, size=region.size, remote=self.remote
            )
        return MemoryRegion.map(
            guest_phys_addr=region.address,
            size=region.size,
            file_offset=region.offset,
            fd=os.dup(region.fd),
            writable=region.writable,
        )

    def remove(self, region: DmaRegion) -> MemoryRegion:
        """A region was unmapped; the caller closes what is returned when nobody uses it."""
        self.stale = True
        return self._regions.pop(region.address)

    def refresh(self, log: DirtyLog | None) -> None:
        """Make :attr:`table` what the client has mapped; *log* is told of writes."""
        self.table = GuestMemory(self._regions.values(), dirty_log=log)
        self.stale = False
