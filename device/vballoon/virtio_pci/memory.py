# SPDX-License-Identifier: Apache-2.0
"""Guest memory made of the DMA map of a vfio-user client.

Regions that came with a file are mapped; the others (the client's ROMs and frame buffers, and all
of RAM that it does not share) are reached by DMA_READ and DMA_WRITE.

**A file need not be what the guest uses.**  QEMU sends the descriptor of any RAM that has a file,
also where it maps the file privately (``memory-backend-memfd,share=off``).  The guest's writes
then never reach the file, and nothing says so.  But a driver that announces buffers has written to
its rings; where the file has only zeroes instead, the client is asked for the same bytes by
message, and if it has something else, the file is not believed any more.  (A file that has old
contents, a template say, is believed: it is the operator's to share it.)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

from vballoon.errors import MemoryFault, ProtocolError
from vballoon.memory import DirtyLog, GuestMemory, MemoryRegion
from vfio_user import DmaError, DmaRegion, DmaTable, RequestError

__all__ = ("ClientMemory",)

log = logging.getLogger(__name__)

_EINVAL = 22
_SAMPLE = 64
"""Bytes of a ring that are compared: four descriptors."""
_CHECKED_MAX = 1024
"""Addresses of rings that are remembered as checked; the guest chooses how many it uses."""

FileId = tuple[int, int]


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
        self._had_memory = False
        self._dma = dma
        self._regions: dict[int, MemoryRegion] = {}
        self._shared: set[FileId] = set()
        self._private: set[FileId] = set()
        self._checked: set[int] = set()  # addresses whose region needs no further check

    def add(self, region: DmaRegion) -> None:
        """Add a mapped region; raise :class:`~vfio_user.RequestError` if it cannot be used."""
        try:
            self._regions[region.address] = self._make(region)
        except ProtocolError as error:
            raise RequestError(_EINVAL, str(error)) from None
        self._had_memory = True
        self._changed()

    @property
    def unmapped(self) -> bool:
        """Whether the client has unmapped all the memory that it had mapped.

        QEMU does so when the guest turns on an IOMMU that translates the device's addresses.
        """
        return self._had_memory and not self._regions

    def _changed(self) -> None:
        self.stale = True
        self._checked.clear()

    def _make(self, region: DmaRegion) -> MemoryRegion:
        if region.fd is not None and _file_id(region.fd) in self._private:
            region.close()
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
        """Remove a region that was unmapped; the caller closes it when nobody uses it any more."""
        self._changed()
        return self._regions.pop(region.address)

    def check_shared(self, addresses: Iterable[int]) -> bool:
        """Return whether the files of *addresses*, where a driver has written, are what it uses.

        False: one of them is not; its regions are reached by messages from now on, and
        :attr:`stale` is set.
        """
        for addr in addresses:
            if addr in self._checked:  # at every doorbell but the first
                continue
            region = self._suspect(addr)
            if region is not None and self._differs(addr):
                self._distrust(region)
                return False
        return True

    def _suspect(self, addr: int) -> DmaRegion | None:
        """Return the region of *addr* if its file is empty there and was never in use."""
        try:
            region = self._dma.find(addr, _SAMPLE)
            if region.fd is not None:
                file = _file_id(region.fd)
                if file not in self._shared and not any(self.table.read(addr, _SAMPLE)):
                    return region
                self._shared.add(file)
        except (DmaError, MemoryFault):
            return None
        if len(self._checked) >= _CHECKED_MAX:
            self._checked.clear()
        self._checked.add(addr)
        return None

    def _differs(self, addr: int) -> bool:
        """Whether the client has something where the file has nothing.

        The file is looked at once more after the answer: a driver that fills its ring while the
        message is under way would else make its own memory look like somebody else's.
        """
        channel = self._dma.channel
        try:
            found = channel is not None and any(channel.dma_read(addr, _SAMPLE))
            return found and not any(self.table.read(addr, _SAMPLE))
        except (DmaError, MemoryFault) as error:
            log.info("cannot compare guest memory: %s", error)
            return False

    def _distrust(self, found: DmaRegion) -> None:
        log.error(
            "guest memory is not shared with this device (share=off): it is reached by messages, "
            "and nothing in it can be discarded"
        )
        assert found.fd is not None  # a suspect has a file
        file = _file_id(found.fd)
        self._private.add(file)
        for region in self._dma.regions:
            if region.fd is not None and _file_id(region.fd) == file:
                region.close()
                self._regions.pop(region.address).close()
                self._regions[region.address] = self._make(region)
        self._changed()

    def forget_files(self) -> None:
        """Forget the files of a client that has gone; the next one has its own."""
        self._had_memory = False
        self._checked.clear()
        self._shared.clear()
        self._private.clear()

    def refresh(self, log: DirtyLog | None) -> None:
        """Make :attr:`table` what the client has mapped; *log* records writes."""
        self.table = GuestMemory(self._regions.values(), dirty_log=log)
        self.stale = False


def _file_id(fd: int) -> FileId:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
