# SPDX-License-Identifier: Apache-2.0
"""Measure a guest's memory on the host: which of its bytes are allocated.

A page that was discarded is a hole in the backing file, and so is one that was never touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def memfds(pid: int) -> list[Path]:
    """Return QEMU's descriptors of its memfds, in the order of their creation."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:
            continue  # closed meanwhile
        if target.startswith("/memfd:memory-backend-memfd"):
            found.append(entry)
    return sorted(found, key=lambda entry: int(entry.name))


class Ram:
    """One memory backend of a running QEMU, given a path that opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def size(self) -> int:
        """Return the size of the backing file in bytes."""
        return self.path.stat().st_size

    def resident(self) -> int:
        """Return the allocated bytes of the backing file (``st_blocks``), without holes."""
        return self.path.stat().st_blocks * 512

    def extents(self) -> Iterator[tuple[int, int]]:
        """Yield ``(start, end)`` of every run of allocated bytes, ascending (``SEEK_DATA``)."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            end = 0
            while True:
                try:
                    start = os.lseek(fd, end, os.SEEK_DATA)
                except OSError:
                    return  # ENXIO: no data after this offset
                end = os.lseek(fd, start, os.SEEK_HOLE)
                yield start, end
        finally:
            os.close(fd)
