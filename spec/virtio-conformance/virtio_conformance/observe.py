# SPDX-License-Identifier: Apache-2.0
"""Observe a back-end from outside: descriptors, processor time, mappings, signals."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

from virtio_conformance.findings import not_applicable

__all__ = ("EventFd", "Process")

_TICK = os.sysconf("SC_CLK_TCK")


class Process:
    """A back-end, given the process that listens; every figure comes from ``/proc``.

    A supervisor may listen and hand the connection to a worker, so that descriptors, mappings and
    processor time are those of the process and of all its descendants.  The kernel gives the id 0
    for a process in another pid namespace, as of a container: nothing is known of it.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @property
    def alive(self) -> bool:
        """Whether it runs (a zombie does not).  Always true of a process that cannot be seen."""
        return self.pid == 0 or self._stat() is not None

    def expect_observable(self) -> None:
        """End the test as not applicable if the process cannot be observed."""
        if self.pid == 0:
            not_applicable("the back-end's process is in another pid namespace")
        if self.alive and not os.access(f"/proc/{self.pid}/fd", os.R_OK):
            not_applicable("the back-end's process belongs to another user")

    def _stat(self) -> list[str] | None:
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return None
        fields = text.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields

    def fds(self) -> list[str]:
        """Return what its descriptors refer to, sorted."""
        self.expect_observable()
        return sorted(name for pid in self.family() for name in _descriptors(pid))

    def family(self) -> list[int]:
        """Return the ids of the process and its descendants."""
        found = [self.pid]
        for pid in found:
            try:
                for task in os.scandir(f"/proc/{pid}/task"):
                    text = Path(task.path, "children").read_text(encoding="ascii")
                    found += [int(child) for child in text.split() if int(child) not in found]
            except OSError:
                continue  # it has ended
        return found

    def mappings(self, of: str) -> int:
        """Return how many mappings of files with *of* in their names it has."""
        self.expect_observable()
        texts = (_text(pid, "maps") for pid in self.family())
        return sum(of in line for text in texts for line in text.splitlines())

    def cpu_seconds(self) -> float:
        """Return the processor time of all its threads so far, in seconds; 0 if it is unknown."""
        return sum(map(_ticks, self.family())) / _TICK

    def resident_bytes(self) -> int:
        """Return its anonymous resident memory in bytes (no files, no shared memory)."""
        self.expect_observable()
        lines = (line for pid in self.family() for line in _text(pid, "status").splitlines())
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

    def cpu_share(self, seconds: float = 0.3) -> float:
        """Return the share of one processor that it uses over the next *seconds*."""
        before, start = self.cpu_seconds(), time.monotonic()
        time.sleep(seconds)
        return (self.cpu_seconds() - before) / (time.monotonic() - start)

    def settles(self, limit: float = 2.0, share: float = 0.5) -> bool:
        """Return whether within *limit* seconds it uses less than *share* of one processor.

        Clock ticks are 10 ms, so that a window of 0.2 s is enough to distinguish idle from
        spinning.
        """
        deadline = time.monotonic() + limit
        while True:
            if self.cpu_share(0.2) < share:
                return True
            if time.monotonic() > deadline:
                return False


def _text(pid: int, name: str) -> str:
    """Return the text of a file in ``/proc``; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _ticks(pid: int) -> int:
    fields = _text(pid, "stat").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]) if fields else 0


def _descriptors(pid: int) -> list[str]:
    found: list[str] = []
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            try:
                found.append(os.readlink(entry.path))
            except OSError:
                continue  # closed meanwhile
    except OSError:
        return []
    return found


class EventFd:
    """An eventfd whose signals are counted."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def signal(self, value: int = 1) -> None:
        """Notify the other side."""
        os.eventfd_write(self.fd, value)

    def take(self) -> int:
        """Return the number of notifications since the last call (an eventfd adds them up)."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def wait(self, limit: float = 2.0) -> int:
        """Return the notifications, waiting for one; 0 if none came within *limit* seconds."""
        if not select.select([self.fd], [], [], limit)[0]:
            return 0
        return self.take()

    def close(self) -> None:
        """Close it.  Closing it again has no effect."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
