# SPDX-License-Identifier: Apache-2.0
"""Guest memory without a guest: files in several regions, compared byte by byte.

Regions have gaps between them, different files, offsets into those files, and guard bytes at both
ends, which detect writes outside of the memory that the back-end got.
Contents are compared through ``pread``: reading a hole through a mapping would fill it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from virtio_conformance.findings import Finding

__all__ = ("PAGE", "GuestRam", "Picture", "Region")

PAGE = 4096
GUARD = 16 * PAGE
"""Bytes of the file before and after a region that no back-end may touch."""

Bytes = NDArray[np.uint8]
Span = tuple[int, int]


@dataclass
class Region:
    """One region: guest-physical and front-end addresses, and the file that backs it."""

    guest: int
    size: int
    user: int
    offset: int
    fd: int
    file_size: int
    view: mmap.mmap
    next_free: int = 0

    @property
    def end(self) -> int:
        """One past the last guest-physical address."""
        return self.guest + self.size

    def bytes_of_file(self) -> Bytes:
        """Return the whole file, read without filling holes."""
        return np.frombuffer(os.pread(self.fd, self.file_size, 0), np.uint8)


@dataclass
class Picture:
    """The contents of all files at one moment."""

    files: list[Bytes] = field(default_factory=list)


class GuestRam:
    """Guest memory in regions.

    Of the default four, the second and the third are adjacent for the guest (but not for the
    front-end), the third and the fourth for the front-end (but not for the guest), and the fourth
    lies above 4 GiB.
    """

    LAYOUT: Sequence[tuple[int, int, int]] = (
        (0x0, 2 << 20, GUARD),
        (0x4000_0000, 4 << 20, 0),
        (0x4040_0000, 2 << 20, GUARD + 7 * PAGE),
        (0x1_4000_0000, 2 << 20, 3 * PAGE),
    )
    """Guest-physical address, size and file offset of each region, in bytes."""
    USER_ADJACENT = 3
    """The region whose front-end address follows on that of the region before it."""

    def __init__(self, layout: Iterable[tuple[int, int, int]] = LAYOUT) -> None:
        self.regions: list[Region] = []
        for guest, size, offset in layout:
            self.regions.append(self._region(guest, size, offset))

    def add_region(self, guest: int, size: int, offset: int) -> Region:
        """Add one more region of memory and return it."""
        self.regions.append(self._region(guest, size, offset))
        return self.regions[-1]

    def _region(self, guest: int, size: int, offset: int) -> Region:
        fd = os.memfd_create("conformance-ram", os.MFD_CLOEXEC)
        file_size = offset + size + GUARD
        os.ftruncate(fd, file_size)
        os.pwrite(fd, _pattern(file_size), 0)  # not by the mapping: that faults page by page
        view = mmap.mmap(fd, file_size)
        user = 0x7E00_0000_0000 + (len(self.regions) << 36) + offset
        if len(self.regions) == self.USER_ADJACENT:
            before = self.regions[-1]
            user = before.user + before.size
        return Region(guest, size, user, offset, fd, file_size, view)

    def close(self) -> None:
        """Unmap and close everything."""
        for region in self.regions:
            try:
                region.view.close()
            except BufferError:  # a ring still has a view; the mapping is freed with the ring
                pass
            os.close(region.fd)
        self.regions.clear()

    # -- addresses ---------------------------------------------------------------------------

    def region_at(self, addr: int) -> Region:
        """Return the region that holds guest-physical *addr*.  Raise KeyError if none does."""
        for region in self.regions:
            if region.guest <= addr < region.end:
                return region
        raise KeyError(f"no memory at {addr:#x}")

    def user(self, addr: int) -> int:
        """Return the front-end address of guest-physical *addr*."""
        region = self.region_at(addr)
        return region.user + addr - region.guest

    def alloc(self, size: int, align: int = 16, region: int = 0) -> int:
        """Return the guest-physical address of a new range of *size* bytes in a region."""
        chosen = self.regions[region]
        start = -(-chosen.next_free // align) * align
        if start + size > chosen.size:
            raise MemoryError(f"{size} bytes do not fit region {region}")
        chosen.next_free = start + size
        return chosen.guest + start

    # -- contents ----------------------------------------------------------------------------

    def view(self, addr: int, dtype: str, count: int = 1) -> NDArray[np.generic]:
        """Return *count* items of guest memory at *addr*, within one region, without a copy."""
        region = self.region_at(addr)
        offset = region.offset + addr - region.guest
        found: NDArray[np.generic] = np.frombuffer(region.view, dtype, count, offset)
        return found

    def write(self, addr: int, data: bytes) -> None:
        """Write bytes; the range may cross into an adjacent region."""
        while data:
            region = self.region_at(addr)
            part = data[: region.end - addr]
            start = region.offset + addr - region.guest
            region.view[start : start + len(part)] = part
            addr, data = addr + len(part), data[len(part) :]

    def read(self, addr: int, size: int) -> bytes:
        """Return *size* bytes without filling holes."""
        found = b""
        while len(found) < size:
            region = self.region_at(addr)
            part = min(size - len(found), region.end - addr)
            found += os.pread(region.fd, part, region.offset + addr - region.guest)
            addr += part
        return found

    def is_hole(self, addr: int, size: int = PAGE) -> bool:
        """Return whether the file has no data at all for this range."""
        region = self.region_at(addr)
        start = region.offset + addr - region.guest
        try:
            return os.lseek(region.fd, start, os.SEEK_DATA) >= start + size
        except OSError:  # ENXIO: no data from here to the end
            return True

    # -- comparison --------------------------------------------------------------------------

    def picture(self) -> Picture:
        """Return the contents of every file, including the guard bytes."""
        return Picture([region.bytes_of_file() for region in self.regions])

    def changes(self, before: Picture, allowed: Iterable[Span] = ()) -> list[str]:
        """Return the ranges that differ from *before* outside the *allowed* guest spans."""
        found: list[str] = []
        for old, region in zip(before.files, self.regions, strict=True):
            differs = old != region.bytes_of_file()
            for start, end in allowed:
                low = max(start, region.guest) - region.guest + region.offset
                high = min(end, region.end) - region.guest + region.offset
                if low < high:
                    differs[low:high] = False
            found += [_name(region, start, end) for start, end in _runs(differs)]
        return found

    def expect_untouched(
        self, before: Picture, allowed: Iterable[Span] = (), *, row: str = ""
    ) -> None:
        """Raise :class:`Finding` about *row* when anything outside *allowed* has changed."""
        found = self.changes(before, allowed)
        if found:
            shown = ", ".join(found[:6]) + (" ..." if len(found) > 6 else "")
            raise Finding(f"memory changed that must not: {shown}", row=row)


@cache
def _pattern(size: int) -> bytes:
    """Return bytes that are never zero and differ from page to page."""
    index = np.arange(size, dtype=np.uint64)
    return (((index * 2654435761) >> 13) % 255 + 1).astype(np.uint8).tobytes()


def _runs(differs: NDArray[np.bool_]) -> list[Span]:
    if not differs.any():
        return []
    edges = np.flatnonzero(np.diff(np.concatenate(([False], differs, [False]))))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _name(region: Region, start: int, end: int) -> str:
    low, high = start - region.offset, end - region.offset
    if high <= 0 or low >= region.size:
        return f"file offset {start:#x}..{end:#x}, outside its region"
    return f"{region.guest + low:#x}..{region.guest + high:#x}"
