# SPDX-License-Identifier: Apache-2.0
"""Inspect another process through /proc: its mappings, its open files, its memory."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from vballoon.errors import UsageError

__all__ = ("Mapping", "Process", "identity")

_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) \S+ (\d+)")


@dataclass(frozen=True, slots=True)
class Mapping:
    """A mapping of a file: addresses ``start`` to ``end``, ``offset`` in the file, bytes."""

    start: int
    end: int
    offset: int
    inode: int
    shared: bool


def identity(fd: int) -> tuple[int, int]:
    """Return (device, inode) of the file at *fd*. Two files in existence never share it."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


class Process:
    """Process *pid*. Methods raise UsageError where /proc does not give access."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._folder = Path(f"/proc/{pid}")

    @property
    def name(self) -> str:
        """``PID:START``, unique among all processes since boot; ``""`` if there is none."""
        with contextlib.suppress(OSError):
            stat = (self._folder / "stat").read_text()
            return f"{self.pid}:{stat.rpartition(')')[2].split()[19]}"
        return ""

    @property
    def folder(self) -> Path:
        """The process' current directory; ours, where it is not accessible."""
        try:
            return Path(os.readlink(self._folder / "cwd"))
        except OSError:
            return Path.cwd()

    def mapping_at(self, address: int) -> Mapping | None:
        """Return the mapping that contains *address*."""
        for line in self._read("maps").splitlines():
            if (found := _MAPPING.match(line)) is None:
                continue
            start, end = int(found[1], 16), int(found[2], 16)
            if start <= address < end:
                offset, inode = int(found[4], 16), int(found[5])
                return Mapping(start, end, offset, inode, found[3].endswith("s"))
        return None

    def page_size_at(self, address: int) -> int:
        """Return the size in bytes of the page-table entries that map *address*.

        Where transparent huge pages map a part of the mapping, return their size.  0: not mapped.
        """
        inside, size = False, 0
        for line in self._read("smaps").splitlines():
            if found := _MAPPING.match(line):
                if inside:
                    break
                inside = int(found[1], 16) <= address < int(found[2], 16)
            elif inside and line.startswith("KernelPageSize:"):
                size = int(line.split()[1]) << 10
            elif inside and line.startswith(("ShmemPmdMapped:", "FilePmdMapped:")):
                size = 2 << 20 if int(line.split()[1]) else size
        return size

    def _read(self, name: str) -> str:
        try:
            return (self._folder / name).read_text()
        except OSError as error:
            raise self._denied(name, error) from None

    def _denied(self, name: str, error: OSError) -> UsageError:
        return UsageError(
            f"{self._folder / name}: {error.strerror}; run as the user of process {self.pid} or "
            "as root, in its PID namespace, or name QEMU's process with --qemu-pid"
        )

    def open_file(self, wanted: tuple[int, int]) -> int | None:
        """Open, for reading, the file *wanted* (device, inode) that the process has open.

        Return a descriptor with an open file description of its own, which the caller closes.
        Return None if the process does not have the file open.
        """
        try:
            names = os.listdir(self._folder / "fd")
        except OSError as error:
            raise self._denied("fd", error) from None
        for name in names:
            path = self._folder / "fd" / name
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                try:
                    status = os.stat(path)
                    if (status.st_dev, status.st_ino) == wanted:
                        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except PermissionError as error:
                    raise self._denied(f"fd/{name}", error) from None
        return None

    def rewrite_byte(self, address: int) -> None:
        """Read the byte at *address* and write the same value, through the process' mapping.

        The process must not write to that byte meanwhile.
        """
        try:
            fd = os.open(self._folder / "mem", os.O_RDWR | os.O_CLOEXEC)
            try:
                os.pwrite(fd, os.pread(fd, 1, address), address)
            finally:
                os.close(fd)
        except OSError as error:
            raise self._denied("mem", error) from None
