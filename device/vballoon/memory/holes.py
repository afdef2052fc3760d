# SPDX-License-Identifier: Apache-2.0
"""Find the parts of a file that hold data; a page that was freed is a hole until it is touched."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from vballoon.memory.ranges import ByteRanges

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vballoon.memory.regions import MemoryRegion

__all__ = ("data_extents", "file_extents", "resident_bytes")

_BLOCK = 512
"""Unit of ``st_blocks`` in bytes."""


def data_extents(region: MemoryRegion) -> ByteRanges:
    """Return where *region* holds data, in bytes from the start of the region.

    Everything else is a hole and reads as zero.  Exact to the file system's page on tmpfs and
    memfd.  Where holes cannot be seen (no file, hugetlbfs, which calls a whole file data, or a
    file system without ``SEEK_DATA``), the whole region counts as data.
    """
    if region.fd is None:
        return ByteRanges([0], [region.size])
    fd = _own_position(region.fd)
    try:
        found = file_extents(fd, region.file_offset, region.file_offset + region.size)
    finally:
        os.close(fd)
    return found.moved(-region.file_offset)


def file_extents(fd: int, start: int, end: int) -> ByteRanges:
    """Return where the bytes [*start*, *end*) of the file hold data, as positions in the file.

    The whole range counts as data where the file system cannot tell.  Moves the file position.
    """
    try:
        return ByteRanges.of(_extents(fd, start, end))
    except OSError:
        return ByteRanges([start], [end])


def resident_bytes(regions: Iterable[MemoryRegion]) -> int:
    """Return how many bytes the host holds for the files of *regions*; each file counts once.

    A file may hold more than the regions show of it.  A region without a file counts 0.
    """
    files = [os.fstat(region.fd) for region in regions if region.fd is not None]
    return sum({(f.st_dev, f.st_ino): f.st_blocks * _BLOCK for f in files}.values())


def _own_position(fd: int) -> int:
    """Open the same file again, so that seeking moves no position that a peer shares."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return os.dup(fd)


def _extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end:
        try:
            data = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # no data from here to the end of the file
            raise
        if data >= end:
            return
        hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        yield data, hole
        start = hole
