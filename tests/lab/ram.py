# SPDX-License-Identifier: Apache-2.0
"""The memory of a guest as the host sees it: which of its bytes exist.

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
            continue  # closed while we looked
        if target.startswith("/memfd:memory-backend-memfd"):
            found.append(entry)
    return sorted(found, key=lambda entry: int(entry.name))


class Ram:
    """One memory backend of a running QEMU, by a path that opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def size(self) -> int:
        """Bytes of the backing file."""
        return self.path.stat().st_size

    def resident(self) -> int:
        """Bytes of the backing file that exist (``st_blocks``; holes do not count)."""
        return self.path.stat().st_blocks * 512

    def extents(self) -> Iterator[tuple[int, int]]:
        """``(start, end)`` of every run of existing bytes, ascending (``SEEK_DATA``)."""
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
