# SPDX-License-Identifier: Apache-2.0
"""Device regions: what a client can read, write and map.

A region is served by two functions, or by a file (a memfd) that the client may map in whole or in
part, or by both: mapped parts are the file, accesses by message go to the functions.  Offsets and
sizes are bytes from the start of the region.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from vfio_user.errors import RequestError, UsageError
from virtio_formats.pci import BarFlags
from virtio_formats.vfio_user import (
    InfoCapId,
    IoEventFd,
    IoFdType,
    RegionFlags,
    RegionInfo,
    SparseMmap,
    SparseMmapArea,
)

__all__ = ("IoEvent", "Region")

PAGE_SIZE = 4096
_MAX_SIZE = 1 << 47
"""Bytes; more than any machine's address lines, and sums of offsets stay below 2**63."""


@dataclass(frozen=True, slots=True)
class IoEvent:
    """Writes to *offset* may be turned into a signal on the eventfd *fd* (KVM_IOEVENTFD).

    *size* is the width of the write, 0 where any will do; *datamatch* is the value that must be
    written, None where any value counts; *callback* is called by the server when *fd* was
    signalled.  The descriptor stays the device's.
    """

    fd: int
    offset: int
    size: int
    callback: Callable[[], None]
    datamatch: int | None = None

    DATAMATCH_FLAG = 1 << 0  # KVM_IOEVENTFD_FLAG_DATAMATCH of <linux/kvm.h>
    PIO_FLAG = 1 << 1  # KVM_IOEVENTFD_FLAG_PIO

    def __post_init__(self) -> None:
        if self.fd < 0:
            raise UsageError(f"an ioeventfd with descriptor {self.fd}")

    def describe(self, fd_index: int, *, io: bool = False) -> bytes:
        """Return this sub-region for DEVICE_GET_REGION_IO_FDS; *io*: it is in an I/O BAR."""
        match = 0 if self.datamatch is None else self.DATAMATCH_FLAG
        return IoEventFd(
            offset=self.offset,
            size=self.size,
            fd_index=fd_index,
            type=IoFdType.IOEVENTFD,
            flags=match | (self.PIO_FLAG if io else 0),
            padding=0,
            datamatch=self.datamatch or 0,
        ).build()


@dataclass(eq=False)
class Region:
    """One region.  Raises :class:`~vfio_user.errors.UsageError` for a layout that cannot be served.

    *read(offset, count)* returns exactly *count* bytes, *write(offset, data)* takes the data; both
    are only called for ranges within the region, and may raise
    :class:`~vfio_user.errors.RequestError`.  Without them, *fd* is read and written.  *areas*
    lists the parts that the client may map, ``(offset, size)`` in whole pages; None with a file
    means all of it, an empty tuple none of it.  *fd* stays the device's.
    """

    size: int
    read: Callable[[int, int], bytes] | None = None
    write: Callable[[int, bytes], None] | None = None
    fd: int | None = None
    fd_offset: int = 0
    areas: tuple[tuple[int, int], ...] | None = None
    bar: BarFlags = BarFlags.MEMORY_32
    io_events: list[IoEvent] = field(default_factory=list)
    writable: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.size <= _MAX_SIZE:
            raise UsageError(f"a region of {self.size} bytes")
        if self.size and self.fd is None and self.read is None:
            raise UsageError("a region needs functions or a file")
        if self.size and self.fd is None and self.write is None:
            self.writable = False
        if self.fd is None and self.areas:
            raise UsageError("areas to map without a file")
        self._check_areas()
        for event in self.io_events:
            if event.offset < 0 or event.offset + max(1, event.size) > self.size:
                raise UsageError(f"an ioeventfd at {event.offset:#x} outside its region")

    def _check_areas(self) -> None:
        end = 0
        for offset, size in self.areas or ():
            if offset % PAGE_SIZE or size % PAGE_SIZE or size <= 0:
                raise UsageError(f"an area of {offset:#x}+{size:#x} is not whole pages")
            if offset < end or offset + size > self.size:
                raise UsageError(f"an area of {offset:#x}+{size:#x} overlaps or ends outside")
            end = offset + size

    @property
    def mappable(self) -> bool:
        """Whether the client may map anything of it."""
        return self.fd is not None and self.areas != ()

    @property
    def flags(self) -> RegionFlags:
        """What the client may do, apart from the CAPS flag of a reply."""
        if not self.size:
            return RegionFlags(0)
        flags = RegionFlags.READ
        if self.writable:
            flags |= RegionFlags.WRITE
        return flags | RegionFlags.MMAP if self.mappable else flags

    def access_read(self, offset: int, count: int) -> bytes:
        """*count* bytes at *offset* for REGION_READ; raises :class:`RequestError`."""
        self._check(offset, count)
        if self.read is not None:
            data = self.read(offset, count) if count else b""
        else:
            data = os.pread(self._file(), count, self.fd_offset + offset)
            data += bytes(count - len(data))
        if len(data) != count:
            raise RequestError(errno.EIO, f"{len(data)} bytes where {count} are due")
        return data

    def access_write(self, offset: int, data: bytes) -> None:
        """Store *data* at *offset* for REGION_WRITE; raises :class:`RequestError`."""
        self._check(offset, len(data))
        if not self.writable:
            raise RequestError(errno.EPERM, "the region is read-only")
        if not data:
            return
        if self.write is not None:
            self.write(offset, data)
        else:
            os.pwrite(self._file(), data, self.fd_offset + offset)

    def _check(self, offset: int, count: int) -> None:
        if not self.size or offset > self.size or count > self.size - offset:
            raise RequestError(
                errno.EINVAL, f"access to {offset:#x}+{count:#x} of a region of {self.size:#x}"
            )

    def _file(self) -> int:
        if self.fd is None:
            raise RequestError(errno.EIO, "the region has neither functions nor a file")
        return self.fd

    def describe(self, index: int, argsz: int) -> bytes:
        """Return the reply to DEVICE_GET_REGION_INFO, with capabilities if *argsz* allows.

        Capabilities that do not fit are left out and not flagged; the reply's argsz says how much
        room they want (the client asks again).
        """
        caps = self._capabilities()
        size = RegionInfo.SIZE + len(caps)
        shown = bool(caps) and argsz >= size
        info = RegionInfo(
            argsz=size,
            flags=self.flags | (RegionFlags.CAPS if shown else 0),
            index=index,
            cap_offset=RegionInfo.SIZE if shown else 0,
            size=self.size,
            offset=self.fd_offset if self.mappable else 0,
        )
        return info.build() + (caps if shown else b"")

    def _capabilities(self) -> bytes:
        if not self.mappable or self.areas is None:
            return b""
        head = SparseMmap(
            id=InfoCapId.SPARSE_MMAP, version=1, next=0, nr_areas=len(self.areas), reserved=0
        )
        return head.build() + b"".join(
            SparseMmapArea(offset=offset, size=size).build() for offset, size in self.areas
        )
