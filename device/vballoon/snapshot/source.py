# SPDX-License-Identifier: Apache-2.0
"""Fetch the files of guest memory and the guest's memmap layout from the back-end."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from vballoon.balloon.memmap import MemmapLayout
from vballoon.control.client import ControlClient
from vballoon.errors import UsageError
from vballoon.memory import GuestMemory, MemoryRegion
from vballoon.snapshot.memmap import FreeMemory, VerificationRefused, free_memory
from vballoon_spec.walk.formats import WalkMemmap, WalkMemmapRun

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vballoon.snapshot.process import Process

__all__ = ("GuestSource", "RamFile")


@dataclass(frozen=True, slots=True)
class RamFile:
    """A file of guest memory; ``regions`` are (guest-physical address, size, offset), bytes.

    ``host_address``: address of its first byte in QEMU's process, 0 if not known.
    """

    fd: int
    size: int
    regions: list[tuple[int, int, int]]
    host_address: int


@dataclass(slots=True)
class GuestSource:
    """Guest memory as the back-end had it; a context manager that closes the descriptors.

    ``no_layout`` says why ``layout`` is None.
    """

    files: list[RamFile]
    layout: MemmapLayout | None
    no_layout: str
    managed_pages: int | None
    poison: int | None
    target: int | None = None
    """Bytes that the operator wants the guest to have; None: all of it."""

    @classmethod
    def fetch(cls, control: ControlClient, process: Process | None = None) -> Self:
        """Return what the back-end at *control* has. Raise :class:`~vballoon.errors.UsageError`.

        *process* is QEMU's. A file that the back-end may not open again is opened there: the
        sandbox of a worker allows that for memfds only.
        """
        answer = control.execute("query-guest-memory")
        files: list[RamFile] = []
        try:
            for number, identity in enumerate(answer["files"]):
                fd = _fetch_fd(control, number, identity, process)
                files.append(_file(fd, number, identity, answer["regions"]))
            layout, managed, why = _fetch_layout(control)
        except BaseException:
            _close(files)
            raise
        size = sum(region["size"] for region in answer["regions"])
        target = answer["target"] if answer["target"] < size else None
        return cls(files, layout, why, managed, answer["poison"], target)

    def free_memory(self) -> FreeMemory:
        """Return the free pages of the guest, which must be stopped.

        Raise :class:`VerificationRefused` where they cannot be verified, or where free pages must
        keep the guest's poison value.
        """
        if self.layout is None:
            raise VerificationRefused(self.no_layout)
        if self.poison:
            raise VerificationRefused(
                f"the guest expects {self.poison:#x} in free pages, and they would be zero"
            )
        memory = self._map()
        try:
            return free_memory(self.layout, memory, managed_pages=self.managed_pages)
        finally:
            memory.close()

    def _map(self) -> GuestMemory:
        return GuestMemory(
            MemoryRegion.map(
                guest_phys_addr=addr,
                size=size,
                file_offset=offset,
                fd=os.dup(file.fd),
                writable=False,
            )
            for file in self.files
            for addr, size, offset in file.regions
        )

    def close(self) -> None:
        """Close the descriptors."""
        _close(self.files)
        self.files = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(files: Sequence[RamFile]) -> None:
    for file in files:
        os.close(file.fd)


def _fetch_fd(
    control: ControlClient, number: int, identity: dict[str, int], process: Process | None
) -> int:
    try:
        control.execute("get-guest-memory-fd", {"file": number})
    except UsageError:
        if process is None:
            raise
        fd = process.open_file((identity["device"], identity["inode"]))
        if fd is None:
            raise
        return fd
    if not control.fds:
        raise UsageError("the back-end did not send a descriptor of guest memory")
    return control.fds.pop()


def _file(fd: int, number: int, identity: dict[str, int], regions: list[dict[str, Any]]) -> RamFile:
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != (identity["device"], identity["inode"]):
        os.close(fd)
        raise UsageError("guest memory changed meanwhile; try again")
    inside = [
        (region["guest-phys-addr"], region["size"], region["file-offset"])
        for region in regions
        if region["file"] == number
    ]
    host = {
        region["userspace-addr"] - region["file-offset"] if region["userspace-addr"] else 0
        for region in regions
        if region["file"] == number
    }
    return RamFile(fd, status.st_size, inside, host.pop() if len(host) == 1 else 0)


def _fetch_layout(control: ControlClient) -> tuple[MemmapLayout | None, int | None, str]:
    """Return the layout, the guest's managed pages, and why there is no layout."""
    try:
        answer, fd = control.execute_fd("get-memmap-layout")
    except UsageError as error:
        return None, None, str(error)
    with os.fdopen(fd, "rb") as file:
        data = file.read()
    queues = control.execute("query-status")["queues"]
    if not any(queue["state"] == "running" for queue in queues):
        # After a reset the front-end only stops the queues: the layout is of the previous kernel.
        return None, None, "the guest's driver is not running"
    runs = np.frombuffer(data, WalkMemmapRun.dtype(), offset=WalkMemmap.SIZE)
    header = WalkMemmap.parse(data[: WalkMemmap.SIZE])
    return MemmapLayout(header, runs, answer["partial"]), answer["managed-pages"], ""
