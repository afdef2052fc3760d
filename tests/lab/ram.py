# SPDX-License-Identifier: Apache-2.0
"""The memory of a guest as the host sees it: which of its bytes exist.

A page that was discarded is a hole in the backing file, and so is one that was never touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tests.lab.cache import LabError


class Ram:
    """One memory backend of a running QEMU."""

    def __init__(self, pid: int, name: str, backing: str, folder: Path) -> None:
        self.pid, self.name, self.backing = pid, name, backing
        self.path = folder / name if backing == "file" else self._descriptor()

    def _descriptor(self) -> Path:
        """QEMU's own descriptor of the backend; memfds are made in the order of the nodes."""
        found = []
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                target = os.readlink(entry)
            except OSError:
                continue  # closed while we looked
            if target.startswith("/memfd:memory-backend-memfd"):
                found.append(entry)
        found.sort(key=lambda entry: int(entry.name))
        number = int(self.name.removeprefix("ram"))
        if number >= len(found):
            raise LabError(f"QEMU has no memory backend {self.name}")
        return found[number]

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
                    return  # ENXIO: no data behind here
                end = os.lseek(fd, start, os.SEEK_HOLE)
                yield start, end
        finally:
            os.close(fd)
