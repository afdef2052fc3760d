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

from vfio_user.descriptors import Descriptors
from vfio_user.dirty import DmaLog
from vfio_user.errors import DmaError, RequestError
from vfio_user.state import DmaWindow, require
from vfio_user.steps import Steps, awaited, finish
from virtio_formats.vfio_user import DmaMap, DmaMapFlags, DmaUnmap, DmaUnmapFlags

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    U64 = NDArray[np.uint64]

__all__ = ("DmaChannel", "DmaRegion", "DmaTable")

PAGE_SIZE = 4096
_SPACE_END = 1 << 64
_MAP_FLAGS = int(DmaMapFlags.READABLE | DmaMapFlags.WRITEABLE)  # int: ~ keeps unnamed bits
_KNOWN_FLAGS = _MAP_FLAGS | 0b1100
"""Newer clients set bits 2 and 3 on memory that comes with a descriptor; they change nothing."""


class DmaChannel(Protocol):
    """Carries DMA_READ and DMA_WRITE messages to the client."""

    def dma_read(self, addr: int, size: int) -> bytes:
        """Return *size* bytes at DMA address *addr*.  Raise DmaError."""

    def dma_write(self, addr: int, data: bytes) -> None:
        """Store *data* at DMA address *addr*.  Raise DmaError."""


class DmaRegion:
    """One window of client memory.  *address* and *size* are bytes, multiples of 4096.

    *fd* is its file (None: by messages only), in which it starts at *offset*.
    """

    def __init__(
        self,
        *,
        address: int,
        size: int,
        flags: DmaMapFlags,
        fd: int | None,
        offset: int,
        descriptors: Descriptors,
    ) -> None:
        self.address = address
        self.size = size
        self.flags = flags
        self.fd = fd
        self.offset = offset
        self._descriptors = descriptors
        self._view: NDArray[np.uint8] | None = None

    @property
    def end(self) -> int:
        """Return one past the last DMA address."""
        return self.address + self.size

    @property
    def readable(self) -> bool:
        """Return whether the device may read it."""
        return bool(self.flags & DmaMapFlags.READABLE)

    @property
    def writable(self) -> bool:
        """Return whether the device may write it."""
        return bool(self.flags & DmaMapFlags.WRITEABLE)

    @property
    def view(self) -> NDArray[np.uint8] | None:
        """Return the bytes (uint8[size]), mapped on first use; None without a file.

        Raise :class:`~vfio_user.errors.DmaError` where the file cannot be mapped.
        """
        if self._view is None and self.fd is not None:
            prot = mmap.PROT_READ | (mmap.PROT_WRITE if self.writable else 0)
            try:
                area = mmap.mmap(self.fd, self.size, mmap.MAP_SHARED, prot, offset=self.offset)
            except (OSError, ValueError, OverflowError) as error:
                raise DmaError(errno.EFAULT, f"cannot map client memory: {error}") from None
            import numpy as np  # not before it is used: it takes longer to import than all the rest

            self._view = np.frombuffer(area, np.uint8)
        return self._view

    def close(self) -> None:
        """Close mapping and descriptor (a view still in use keeps the pages mapped)."""
        self._view = None
        fd, self.fd = self.fd, None
        self._descriptors.close(fd)

    def window(self) -> DmaWindow:
        """Return the region as a value, with the slot of its descriptor."""
        return DmaWindow(
            address=self.address,
            size=self.size,
            flags=int(self.flags),
            offset=0 if self.fd is None else self.offset,
            slot=self._descriptors.slot(self.fd),
        )

    def __repr__(self) -> str:
        return f"<DmaRegion {self.address:#x}+{self.size:#x}{'' if self.fd is None else ' mapped'}>"


class DmaTable:
    """The windows of client memory that are valid now, sorted by address.

    *descriptors* owns their files.  *channel* carries messages while a client is connected; *log*
    records what the device wrote; *on_map* and *on_unmap* are called for every change, *on_unmap*
    before the region is closed.
    """

    def __init__(self, descriptors: Descriptors | None = None) -> None:
        self._descriptors = descriptors or Descriptors()
        self.regions: list[DmaRegion] = []
        self.channel: DmaChannel | None = None
        self.log = DmaLog()
        self.on_map: Callable[[DmaRegion], None] | None = None
        self.on_unmap: Callable[[DmaRegion], Awaitable[None] | None] | None = None
        self._starts: list[int] = []

    # -- the client's side ------------------------------------------------------------------------

    def map(self, request: DmaMap, fd: int | None, *, limit: int) -> DmaRegion:
        """Serve DMA_MAP.  Take *fd* over on success.

        Raise :class:`~vfio_user.errors.RequestError`: EEXIST for an overlap, ENOSPC for a range
        past the end of the address space, EINVAL for anything else, more than *limit* regions
        included.
        """
        _check_map(request)
        if fd is None and request.flags & ~_MAP_FLAGS:
            raise RequestError(errno.EINVAL, f"DMA_MAP flags {request.flags:#x}, no descriptor")
        if len(self.regions) >= limit:
            raise RequestError(errno.EINVAL, f"more than {limit} DMA regions")
        if fd is not None:
            _check_file(fd, request)
            self._descriptors.take(fd)
        try:
            return self._insert(request, fd)
        except BaseException:
            if fd is not None and self._descriptors.holds(fd):
                self._descriptors.give_up(fd)
            raise

    def _insert(self, request: DmaMap, fd: int | None) -> DmaRegion:
        position = bisect_right(self._starts, request.address)
        around = self.regions[max(position - 1, 0) : position + 1]
        end = request.address + request.size
        if any(r.address < end and request.address < r.end for r in around):
            raise RequestError(errno.EEXIST, f"DMA region {request.address:#x} overlaps another")
        region = DmaRegion(
            address=request.address,
            size=request.size,
            flags=DmaMapFlags(request.flags & _MAP_FLAGS),
            fd=fd,
            offset=request.offset if fd is not None else 0,
            descriptors=self._descriptors,
        )
        if fd is not None and stat.S_ISCHR(os.fstat(fd).st_mode):
            _map_or_close(region)
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
        """Serve DMA_UNMAP as :meth:`unmapping` does, with a device that does not wait."""
        finish(self.unmapping(request))

    def unmapping(self, request: DmaUnmap) -> Steps[None]:
        """Serve DMA_UNMAP of exactly one region, or of all of them.

        Raise :class:`~vfio_user.errors.RequestError`: EINVAL for flags or sizes that do not go
        together, ENOENT where no such region is mapped.
        """
        if request.flags not in (0, DmaUnmapFlags.ALL):
            raise RequestError(errno.EINVAL, f"DMA_UNMAP flags {request.flags:#x}")
        if request.flags == DmaUnmapFlags.ALL:
            if request.address or request.size:
                raise RequestError(errno.EINVAL, "DMA_UNMAP of all with an address")
            yield from self.clearing()
            return
        index = self._index(request.address)
        if index is None or self.regions[index].size != request.size:
            raise RequestError(errno.ENOENT, f"no DMA region {request.address:#x}")
        if self.regions[index].address != request.address:
            raise RequestError(errno.ENOENT, f"no DMA region starts at {request.address:#x}")
        yield from self._remove(index)

    def clear(self) -> None:
        """Unmap everything as :meth:`clearing` does, with a device that does not wait."""
        finish(self.clearing())

    def clearing(self) -> Steps[None]:
        """Unmap everything (the client has disconnected, or asked for it)."""
        failed: Exception | None = None
        while self.regions:
            try:
                yield from self._remove(len(self.regions) - 1)
            except Exception as error:  # of a hook; the other regions are unmapped too
                failed = failed or error
        if failed is not None:
            raise failed

    def _remove(self, index: int) -> Steps[None]:
        region = self.regions.pop(index)
        del self._starts[index]
        try:
            if self.on_unmap is not None:
                yield from awaited(self.on_unmap(region))
        finally:
            region.close()

    # -- state ------------------------------------------------------------------------------------

    def state(self) -> tuple[DmaWindow, ...]:
        """Return the windows in order of address."""
        return tuple(region.window() for region in self.regions)

    def check(self, windows: Sequence[DmaWindow], fds: Mapping[int, int], limit: int) -> None:
        """Raise :class:`~vfio_user.errors.RequestError` unless :meth:`restore` can work."""
        require(len(windows) <= limit, f"more than {limit} DMA regions")
        end = 0
        for window in windows:
            request = _request(window)
            _check_map(request)
            require(window.address >= end, f"DMA region {window.address:#x} out of order")
            end = window.address + window.size
            if window.slot is None:
                require(not window.offset, "a file offset without a file")
            else:
                _check_file(fds[window.slot], request)

    def restore(self, windows: Sequence[DmaWindow], fds: Mapping[int, int]) -> None:
        """Take checked windows over into an empty table; *fds* are duplicated."""
        for window in windows:
            slot = window.slot
            fd = None if slot is None else self._descriptors.adopt(slot, fds[slot])
            try:
                self._insert(_request(window), fd)
            except BaseException:
                if fd is not None and self._descriptors.holds(fd):
                    self._descriptors.close(fd)
                raise

    # -- the device's side ------------------------------------------------------------------------

    def contains(self, addr: U64, length: U64) -> NDArray[np.bool_]:
        """Return which ranges (uint64[n], bytes) each lie within one region (bool[n])."""
        import numpy as np

        found = np.zeros(addr.shape, np.bool_)
        for region in self.regions:
            offset = addr - np.uint64(region.address)  # below the region it wraps, far past the end
            found |= (offset <= region.size) & (length <= np.uint64(region.size) - offset)
        return found

    def find(self, addr: int, size: int) -> DmaRegion:
        """Return the region that holds the whole range.  Raise DmaError EFAULT if none does."""
        index = self._index(addr)
        if index is None or size < 0 or size > self.regions[index].end - addr:
            raise DmaError(errno.EFAULT, f"{addr:#x}+{size:#x} is not client memory")
        return self.regions[index]

    def read(self, addr: int, size: int) -> bytes:
        """Return *size* bytes at *addr*, adjacent regions joined.

        Raise :class:`~vfio_user.errors.DmaError`: outside the map, or not readable.
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

        Raise :class:`~vfio_user.errors.DmaError`: outside the map, or not writeable.
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
                memoryview(view)[offset : offset + count] = part  # type: ignore[arg-type]
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


def _map_or_close(region: DmaRegion) -> None:
    """Map a character device at once; one that cannot be mapped is reached by messages."""
    try:
        region.view  # noqa: B018
    except DmaError:
        region.close()


def _request(window: DmaWindow) -> DmaMap:
    return DmaMap(
        argsz=DmaMap.SIZE,
        flags=window.flags,
        offset=window.offset,
        address=window.address,
        size=window.size,
    )


def _check_map(request: DmaMap) -> None:
    if request.argsz < DmaMap.SIZE:
        raise RequestError(errno.EINVAL, f"DMA_MAP argsz {request.argsz}")
    if not request.flags & _MAP_FLAGS or request.flags & ~_KNOWN_FLAGS:
        raise RequestError(errno.EINVAL, f"DMA_MAP flags {request.flags:#x}")
    if not request.size or request.address % PAGE_SIZE or request.size % PAGE_SIZE:
        raise RequestError(errno.EINVAL, f"DMA_MAP of {request.address:#x}+{request.size:#x}")
    # The last page is left out, so that the end of a region always fits in 64 bits.
    if request.address + request.size > _SPACE_END - PAGE_SIZE:
        raise RequestError(errno.ENOSPC, "DMA_MAP past the end of the address space")


def _check_file(fd: int, request: DmaMap) -> None:
    """Refuse a mapping past the end of its file: a later access would raise SIGBUS."""
    try:
        found = os.fstat(fd)
    except OSError as error:
        raise RequestError(errno.EINVAL, f"DMA_MAP descriptor: {error.strerror}") from None
    if stat.S_ISCHR(found.st_mode):
        return  # /dev/dax has no size; whether it can be mapped is found out by mapping it
    if not stat.S_ISREG(found.st_mode):
        raise RequestError(errno.EINVAL, "DMA_MAP descriptor is not a file that can be mapped")
    if request.offset % PAGE_SIZE or request.offset + request.size > found.st_size:
        raise RequestError(
            errno.EINVAL,
            f"DMA_MAP of {request.offset:#x}+{request.size:#x} in a file of {found.st_size:#x}",
        )
