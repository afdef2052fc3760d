# SPDX-License-Identifier: Apache-2.0
"""One region of guest memory: where it is for the guest, and how the device reaches it.

A region is either mapped (it came with a descriptor: vhost-user memory tables, vfio-user DMA maps
with a descriptor) or reached by messages (:class:`RemoteMemory`).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from vballoon.errors import ProtocolError
from vballoon.memory.pages import PAGE_SIZE
from vballoon.native import guard

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("MemoryRegion", "RemoteMemory", "backing_page_size")

_ADDRESS_END = 1 << 64
_HUGETLBFS_MAGIC = 0x958458F6  # f_type of hugetlbfs, <linux/magic.h>


class RemoteMemory(Protocol):
    """Memory without a descriptor, reached by messages (vfio-user ``DMA_READ``/``DMA_WRITE``)."""

    def dma_read(self, addr: int, size: int) -> bytes:
        """*size* bytes at guest-physical *addr*; raises MemoryFault when refused."""

    def dma_write(self, addr: int, data: bytes) -> None:
        """Store *data* at guest-physical *addr*; raises MemoryFault when refused."""


class _StatFs(ctypes.Structure):
    """The head of ``struct statfs`` on 64-bit Linux; the rest is room only."""

    _fields_ = (("f_type", ctypes.c_long), ("f_bsize", ctypes.c_long), ("rest", ctypes.c_long * 30))


def backing_page_size(fd: int) -> int:
    """Return the page size of the file *fd*: the huge page size on hugetlbfs, else 4096."""
    # os.statvfs does not tell the file system's type, and its f_bsize may be an I/O hint.
    found = _StatFs()
    if ctypes.CDLL(None, use_errno=True).fstatfs(fd, ctypes.byref(found)) != 0:
        return PAGE_SIZE
    if found.f_type & 0xFFFFFFFF != _HUGETLBFS_MAGIC:
        return PAGE_SIZE
    return int(found.f_bsize)


class MemoryRegion:
    """A contiguous range of guest-physical memory.  Immutable, until it is closed.

    ``guest_phys_addr``, ``size`` and ``file_offset`` (where the region starts in the file
    ``fd``; None: no file) are bytes, multiples of 4096; ``userspace_addr`` is the front-end's
    virtual address of the same bytes (0: not known); ``view`` is the mapping (uint8[size]) or
    None; ``page_size`` is that of the backing file, bytes; ``remote`` reaches memory without a
    mapping.
    """

    def __init__(
        self,
        *,
        guest_phys_addr: int,
        size: int,
        userspace_addr: int = 0,
        file_offset: int = 0,
        fd: int | None = None,
        view: NDArray[np.uint8] | None = None,
        page_size: int = PAGE_SIZE,
        remote: RemoteMemory | None = None,
    ) -> None:
        _check_range("memory-region-address", guest_phys_addr, size)
        _check_range("memory-region-userspace", userspace_addr, size)
        if (guest_phys_addr | size | file_offset) % PAGE_SIZE:
            raise ProtocolError(
                "memory-region-alignment", f"{guest_phys_addr:#x}+{size:#x} at {file_offset:#x}"
            )
        self.guest_phys_addr = guest_phys_addr
        self.size = size
        self.userspace_addr = userspace_addr
        self.file_offset = file_offset
        self.fd = fd
        self.view = view
        self.page_size = page_size
        self.remote = remote
        self._watch: guard.Watch | None = None

    @classmethod
    def map(
        cls,
        *,
        guest_phys_addr: int,
        size: int,
        file_offset: int,
        fd: int,
        userspace_addr: int = 0,
        writable: bool = True,
    ) -> Self:
        """Map *size* bytes of the file *fd* from *file_offset* on; take over *fd*.

        Raises :class:`~vballoon.errors.ProtocolError` (and closes *fd*) for a range that is not
        a whole number of pages, not within the file, or that cannot be mapped.
        """
        try:
            region = cls(
                guest_phys_addr=guest_phys_addr,
                size=size,
                userspace_addr=userspace_addr,
                file_offset=file_offset,
                fd=fd,
                page_size=backing_page_size(fd),
            )
            region.view = _map_file(fd, file_offset, size, region.page_size, writable)
            region._watch = guard.watch(region.view, region.page_size)
        except BaseException:
            _close_quietly(fd)
            raise
        return region

    @property
    def end(self) -> int:
        """One past the region's last guest-physical address."""
        return self.guest_phys_addr + self.size

    @property
    def lost(self) -> bool:
        """Whether an access to the mapping has failed; it reads as zeroes there now."""
        return self._watch is not None and self._watch.faults > 0

    def close(self) -> None:
        """Let go of the mapping and the descriptor; safe to call twice.

        The pages stay mapped for as long as anything still holds a window on them, so that a late
        access reads old memory instead of faulting.
        """
        self.view = None
        fd, self.fd = self.fd, None
        if fd is not None:
            _close_quietly(fd)

    def __repr__(self) -> str:
        return f"<MemoryRegion {self.guest_phys_addr:#x}+{self.size:#x} file {self.file_offset:#x}>"


def _check_range(rule: str, start: int, size: int) -> None:
    # The last page of the 64-bit space is refused, so that an end always fits in 64 bits.
    if size <= 0 or start < 0 or start + size > _ADDRESS_END - PAGE_SIZE:
        raise ProtocolError(rule, f"{start:#x}+{size:#x}")


def _map_file(fd: int, offset: int, size: int, page_size: int, writable: bool) -> NDArray[np.uint8]:
    try:
        file_size = os.fstat(fd).st_size
    except OSError as error:
        raise ProtocolError("memory-region-map", str(error)) from None
    if offset < 0 or offset + size > file_size:
        # A mapping past the end of its file turns an access into SIGBUS.
        raise ProtocolError(
            "memory-region-file", f"{offset:#x}+{size:#x} of a file of {file_size:#x} bytes"
        )
    # mmap wants its offset (and hugetlbfs also its length) in whole pages of the backing.
    start = offset - offset % page_size
    length = offset + size - start
    length += -length % page_size if page_size > PAGE_SIZE else 0
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        mapping = mmap.mmap(fd, length, flags=mmap.MAP_SHARED, prot=prot, offset=start)
    except (OSError, ValueError, OverflowError) as error:
        raise ProtocolError("memory-region-map", str(error)) from None
    return np.frombuffer(mapping, np.uint8, count=size, offset=offset - start)


def _close_quietly(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        pass  # the peer may hand over a number that is not open; there is nothing to undo
