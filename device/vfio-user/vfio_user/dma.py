# SPDX-License-Identifier: Apache-2.0
"""The DMA map: which client memory the device may reach, and how.

vfio-user specification (QEMU 11.1), ``VFIO_USER_DMA_MAP`` and ``VFIO_USER_DMA_UNMAP``.  A region
with a descriptor is mapped into this process when it is first touched; one without is reached by
DMA_READ and DMA_WRITE messages.  The table owns the descriptors.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from bisect import bisect_right
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vfio_user.dirty import DmaLog
from vfio_user.errors import DmaError, RequestError
from virtio_formats.vfio_user import DmaMap, DmaMapFlags, DmaUnmap, DmaUnmapFlags

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    U64 = NDArray[np.uint64]

__all__ = ("DmaChannel", "DmaRegion", "DmaTable")

PAGE_SIZE = 4096
_SPACE_END = 1 << 64
_MAP_FLAGS = int(DmaMapFlags.READABLE | DmaMapFlags.WRITEABLE)  # int: ~ is to keep other bits


class DmaChannel(Protocol):
    """Who carries DMA_READ and DMA_WRITE messages to the client."""

    def dma_read(self, addr: int, size: int) -> bytes:
        """*size* bytes at DMA address *addr*; raises :class:`~vfio_user.errors.DmaError`."""

    def dma_write(self, addr: int, data: bytes) -> None:
        """Store *data* at DMA address *addr*; raises :class:`~vfio_user.errors.DmaError`."""


class DmaRegion:
    """One window of client memory.  *address* and *size* are bytes, multiples of 4096.

    *fd* is its file (None: by messages only), in which it starts at *offset*.
    """

    def __init__(
        self, *, address: int, size: int, flags: DmaMapFlags, fd: int | None, offset: int
    ) -> None:
        self.address = address
        self.size = size
        self.flags = flags
        self.fd = fd
        self.offset = offset
        self._view: NDArray[np.uint8] | None = None

    @property
    def end(self) -> int:
        """One past the last DMA address."""
        return self.address + self.size

    @property
    def readable(self) -> bool:
        """Whether the device may read it."""
        return bool(self.flags & DmaMapFlags.READABLE)

    @property
    def writable(self) -> bool:
        """Whether the device may write it."""
        return bool(self.flags & DmaMapFlags.WRITEABLE)

    @property
    def view(self) -> NDArray[np.uint8] | None:
        """The mapped bytes (uint8[size]), mapped now if they were not; None without a file."""
        if self._view is None and self.fd is not None:
            prot = mmap.PROT_READ | (mmap.PROT_WRITE if self.writable else 0)
            try:
                area = mmap.mmap(self.fd, self.size, mmap.MAP_SHARED, prot, offset=self.offset)
            except (OSError, ValueError, OverflowError) as error:
                raise DmaError(errno.EFAULT, f"cannot map client memory: {error}") from None
            self._view = np.frombuffer(area, np.uint8)
        return self._view

    def close(self) -> None:
        """Let go of mapping and descriptor (a view still in use keeps the pages mapped)."""
        self._view = None
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)

    def __repr__(self) -> str:
        return f"<DmaRegion {self.address:#x}+{self.size:#x}{'' if self.fd is None else ' mapped'}>"


class DmaTable:
    """The windows of client memory that are valid now, sorted by address.

    *channel* carries messages while a client is connected; *log* records what the device wrote;
    *on_map* and *on_unmap* are told of every change, *on_unmap* before the region is closed.
    """

    def __init__(self) -> None:
        self.regions: list[DmaRegion] = []
        self.channel: DmaChannel | None = None
        self.log = DmaLog()
        self.on_map: Callable[[DmaRegion], None] | None = None
        self.on_unmap: Callable[[DmaRegion], None] | None = None
        self._starts: list[int] = []

    # -- the client's side ------------------------------------------------------------------------

    def map(self, request: DmaMap, fd: int | None, *, limit: int) -> DmaRegion:
        """DMA_MAP.  Takes *fd* over if it succeeds.

        Raises :class:`~vfio_user.errors.RequestError`: EEXIST for an overlap, ENOSPC for a range
        past the end of the address space, EINVAL for anything else, more than *limit* regions
        included.
        """
        _check_map(request)
        if len(self.regions) >= limit:
            raise RequestError(errno.EINVAL, f"more than {limit} DMA regions")
        if fd is not None:
            _check_file(fd, request)
        position = bisect_right(self._starts, request.address)
        around = self.regions[max(position - 1, 0) : position + 1]
        end = request.address + request.size
        if any(r.address < end and request.address < r.end for r in around):
            raise RequestError(errno.EEXIST, f"DMA region {request.address:#x} overlaps another")
        region = DmaRegion(
            address=request.address,
            size=request.size,
            flags=DmaMapFlags(request.flags),
            fd=fd,
            offset=request.offset if fd is not None else 0,
        )
        self.regions.insert(position, region)
        self._starts.insert(position, region.address)
        try:
            if self.on_map is not None:
                self.on_map(region)
        except BaseException:
            region.fd = None  # it stays the caller's
            del self.regions[position], self._starts[position]
            raise
        return region

    def unmap(self, request: DmaUnmap) -> None:
        """DMA_UNMAP of exactly one region, or of all of them.

        Raises :class:`~vfio_user.errors.RequestError`: EINVAL for flags or sizes that do not go
        together, ENOENT where no such region is mapped.
        """
        if request.flags not in (0, DmaUnmapFlags.ALL):
            raise RequestError(errno.EINVAL, f"DMA_UNMAP flags {request.flags:#x}")
        if request.flags == DmaUnmapFlags.ALL:
            if request.address or request.size:
                raise RequestError(errno.EINVAL, "DMA_UNMAP of all with an address")
            self.clear()
            return
        index = self._index(request.address)
        if index is None or self.regions[index].size != request.size:
            raise RequestError(errno.ENOENT, f"no DMA region {request.address:#x}")
        if self.regions[index].address != request.address:
            raise RequestError(errno.ENOENT, f"no DMA region starts at {request.address:#x}")
        self._remove(index)

    def clear(self) -> None:
        """Unmap everything (the client has gone, or asked for it)."""
        while self.regions:
            self._remove(len(self.regions) - 1)

    def _remove(self, index: int) -> None:
        region = self.regions.pop(index)
        del self._starts[index]
        try:
            if self.on_unmap is not None:
                self.on_unmap(region)
        finally:
            region.close()

    # -- the device's side ------------------------------------------------------------------------

    def contains(self, addr: U64, length: U64) -> NDArray[np.bool_]:
        """Which ranges (uint64[n], bytes) each lie within one region (bool[n])."""
        found = np.zeros(addr.shape, np.bool_)
        for region in self.regions:
            offset = addr - np.uint64(region.address)  # below the region it wraps, far past the end
            found |= (offset <= region.size) & (length <= np.uint64(region.size) - offset)
        return found

    def find(self, addr: int, size: int) -> DmaRegion:
        """The region that holds the whole range; raises :class:`~vfio_user.errors.DmaError`."""
        index = self._index(addr)
        if index is None or size < 0 or size > self.regions[index].end - addr:
            raise DmaError(errno.EFAULT, f"{addr:#x}+{size:#x} is not client memory")
        return self.regions[index]

    def read(self, addr: int, size: int) -> bytes:
        """*size* bytes at *addr*, adjacent regions joined.

        Raises :class:`~vfio_user.errors.DmaError`: outside the map, or not readable.
        """
        parts = []
        for region, start, count in self._pieces(addr, size):
            if not region.readable:
                raise DmaError(errno.EACCES, f"{start:#x} is not readable")
            view = region.view
            if view is not None:
                offset = start - region.address
                parts.append(view[offset : offset + count].tobytes())
            else:
                parts.append(self._messages().dma_read(start, count))
        return b"".join(parts)

    def write(self, addr: int, data: bytes) -> None:
        """Store *data* at *addr* and log it.

        Raises :class:`~vfio_user.errors.DmaError`: outside the map, or not writeable.
        """
        pieces = self._pieces(addr, len(data))
        if not all(region.writable for region, _, _ in pieces):
            raise DmaError(errno.EACCES, f"{addr:#x}+{len(data):#x} is not writeable")
        done = 0
        for region, start, count in pieces:
            part = data[done : done + count]
            view = region.view
            if view is not None:
                offset = start - region.address
                view[offset : offset + count] = np.frombuffer(part, np.uint8)
            else:
                self._messages().dma_write(start, part)
            self.log.mark(start, count)
            done += count

    def _messages(self) -> DmaChannel:
        if self.channel is None:
            raise DmaError(errno.ENOTCONN, "no client is connected")
        return self.channel

    def _index(self, addr: int) -> int | None:
        index = bisect_right(self._starts, addr) - 1
        return index if index >= 0 and addr < self.regions[index].end else None

    def _pieces(self, addr: int, size: int) -> list[tuple[DmaRegion, int, int]]:
        pieces = []
        while size > 0:
            region = self.find(addr, 1)
            count = min(size, region.end - addr)
            pieces.append((region, addr, count))
            addr, size = addr + count, size - count
        return pieces


def _check_map(request: DmaMap) -> None:
    if request.argsz < DmaMap.SIZE:
        raise RequestError(errno.EINVAL, f"DMA_MAP argsz {request.argsz}")
    if not request.flags or request.flags & ~_MAP_FLAGS:
        raise RequestError(errno.EINVAL, f"DMA_MAP flags {request.flags:#x}")
    if not request.size or request.address % PAGE_SIZE or request.size % PAGE_SIZE:
        raise RequestError(errno.EINVAL, f"DMA_MAP of {request.address:#x}+{request.size:#x}")
    # The last page is left out, so that the end of a region always fits in 64 bits.
    if request.address + request.size > _SPACE_END - PAGE_SIZE:
        raise RequestError(errno.ENOSPC, "DMA_MAP past the end of the address space")


def _check_file(fd: int, request: DmaMap) -> None:
    """A mapping past the end of its file would turn a later access into a signal."""
    try:
        found = os.fstat(fd)
    except OSError as error:
        raise RequestError(errno.EINVAL, f"DMA_MAP descriptor: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise RequestError(errno.EINVAL, "DMA_MAP descriptor is not a file that can be mapped")
    if request.offset % PAGE_SIZE or request.offset + request.size > found.st_size:
        raise RequestError(
            errno.EINVAL,
            f"DMA_MAP of {request.offset:#x}+{request.size:#x} in a file of {found.st_size:#x}",
        )
