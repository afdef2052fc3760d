# SPDX-License-Identifier: Apache-2.0
"""Which parts of a region hold data: the backing file's holes are the truth about freed pages."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from vballoon.memory.regions import MemoryRegion

__all__ = ("data_extents",)


def data_extents(region: MemoryRegion) -> NDArray[np.int64]:
    """Where *region* holds data: int64[k, 2], [start, end) in bytes from the region's start.

    Ascending and disjoint; everything else is a hole and reads as zero.  Exact to the file
    system's page on tmpfs and memfd.  Where holes cannot be seen (no file, hugetlbfs, which calls
    a whole file data, or a file system without ``SEEK_DATA``), the whole region counts as data.
    """
    if region.fd is None:
        return np.array([[0, region.size]], np.int64)
    fd = _own_position(region.fd)
    try:
        found = list(_extents(fd, region.file_offset, region.file_offset + region.size))
    except OSError:
        found = [(region.file_offset, region.file_offset + region.size)]
    finally:
        os.close(fd)
    return np.array(found, np.int64).reshape(-1, 2) - region.file_offset


def _own_position(fd: int) -> int:
    """A descriptor of the same file; seeking on it moves no position that a peer shares."""
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
