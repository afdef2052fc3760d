# SPDX-License-Identifier: Apache-2.0
"""Track which guest pages were written since a moment: the other half of the safety rule.

:class:`SoftDirty` reads the marks that Linux keeps in QEMU's page tables
(``CONFIG_MEM_SOFT_DIRTY``: /proc/PID/clear_refs and bit 55 of /proc/PID/pagemap).  The marks are
complete only under conditions.  Those are checked: where one does not hold there is no tracker.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vballoon.errors import UsageError
from vballoon.memory import PAGE_SIZE, ByteRanges
from vballoon.snapshot.extents import data_extents
from vballoon.snapshot.process import Process

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vballoon.snapshot.source import RamFile

__all__ = ("SoftDirty", "WriteTracker", "backing_objection", "marked", "objections")

SOFT_DIRTY, PRESENT = np.uint64(1 << 55), np.uint64(1 << 63)
READ_PAGES = 1 << 20
"""Entries of pagemap read at a time (8 MiB, 4 GiB of guest)."""
SWAPS = Path("/proc/swaps")
SHMEM_HUGE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
MOUNTS = Path("/proc/self/mountinfo")


def backing_objection(fd: int) -> str:
    """Return why writes to the memory file at *fd* are not marked reliably, or ``""``.

    Accept only what is known to work: a memfd, or a file on a tmpfs, with pages of 4096 bytes.
    Marks of hugetlb pages never come back once they are cleared; pages of a file on a disk lose
    them when the host reclaims memory.
    """
    if os.fstatvfs(fd).f_bsize != PAGE_SIZE:
        return f"guest memory has huge pages of {os.fstatvfs(fd).f_bsize >> 10} KiB"
    kind, huge = _mount(os.fstat(fd).st_dev)
    if not kind and os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:"):
        return ""  # SHMEM_HUGE holds for these
    if kind != "tmpfs":
        return f"guest memory is a file on {kind or 'an unknown file system'}, not on tmpfs"
    if huge not in ("", "never"):
        return f"guest memory is on a tmpfs that is mounted with huge={huge}"
    return ""


def _mount(device: int) -> tuple[str, str]:
    """Return the type of the file system *device* and its option ``huge``; ``""``: has none."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in MOUNTS.read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == number:
            kind, _, options = after.split(" ", 2)
            huge = [o.removeprefix("huge=") for o in options.split(",") if o.startswith("huge=")]
            return kind, huge[0] if huge else ""
    return "", ""


def _sample(extents: ByteRanges) -> list[int]:
    """Return the first, a middle and the last page of *extents*, as byte offsets."""
    pairs = extents.tolist()
    if not pairs:
        return []
    places = (pairs[0][0], pairs[len(pairs) // 2][0], pairs[-1][1] - PAGE_SIZE)
    return sorted({at - at % PAGE_SIZE for at in places})


class WriteTracker(Protocol):
    """Finds the written pages of the guest's memory files."""

    def start(self) -> None:
        """Begin to track writes."""

    def collect(self) -> list[ByteRanges]:
        """Return for each file what was written since the last call or the start.

        int64[k, 2] in bytes.  The guest must be stopped: writes between reading and clearing the
        marks would be lost.
        """


def objections() -> str:
    """Return why soft-dirty marks are not reliable on this host, or ``""``."""
    if not _kernel_marks():
        return "this kernel does not track writes (CONFIG_MEM_SOFT_DIRTY)"
    if len(SWAPS.read_text().splitlines()) > 1:
        return "this host swaps, and pages that were swapped lose their marks"
    if SHMEM_HUGE.exists() and not {"[never]", "[deny]"} & set(SHMEM_HUGE.read_text().split()):
        return f"huge pages for shared memory lose marks: {SHMEM_HUGE} must say never"
    for size in sorted(SHMEM_HUGE.parent.glob("hugepages-*/shmem_enabled")):  # since Linux 6.11
        if not {"[never]", "[inherit]"} & set(size.read_text().split()):
            return f"huge pages for shared memory lose marks: {size} must say never or inherit"
    return ""


def _kernel_marks() -> bool:
    """Return whether a write to a page of this process is marked, and not marked before it.

    A mapping that grows meanwhile is marked throughout, so this may take some attempts.
    """
    return any(_mark_is_seen() for _ in range(5))


def _mark_is_seen() -> bool:
    memory = np.ones(4 << 20, np.uint8)  # large enough to get its own mapping
    middle = memory.ctypes.data + memory.size // 2
    pagemap = Path("/proc/self/pagemap")
    try:
        Path("/proc/self/clear_refs").write_text("4")
        before = _read_marks(pagemap, middle // PAGE_SIZE, 1)[0]
        memory[memory.size // 2] = 2
        after = _read_marks(pagemap, middle // PAGE_SIZE, 1)[0]
    except (OSError, UsageError):
        return False
    return bool(not before & SOFT_DIRTY and after & SOFT_DIRTY)


def _read_marks(pagemap: Path, first: int, pages: int) -> NDArray[np.uint64]:
    with pagemap.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), 8 * pages, 8 * first)
    if len(data) != 8 * pages:
        raise UsageError(f"{pagemap} ends early")
    return np.frombuffer(data, np.uint64)


def marked(entries: NDArray[np.uint64], first: int = 0) -> NDArray[np.int64]:
    """Return the runs of pagemap entries that are written or not present.

    An entry that is not present has lost its mark.  int64[k, 2] in bytes; entry 0 is page *first*.
    """
    written = (entries & SOFT_DIRTY != 0) | (entries & PRESENT == 0)
    edges = np.flatnonzero(np.diff(written.astype(np.int8), prepend=0, append=0))
    return (edges.reshape(-1, 2) + first) * PAGE_SIZE


class SoftDirty:
    """Soft-dirty marks of process *pid*; *blocks*: (address in it, its file) of guest memory.

    Raise :class:`~vballoon.errors.UsageError` where marks are not reliable or not accessible.
    """

    def __init__(self, pid: int, blocks: Sequence[tuple[int, RamFile]]) -> None:
        self._process = Process(pid)
        self._folder = Path(f"/proc/{pid}")
        self._blocks = list(blocks)
        reason = objections()
        if not reason and not os.access(self._folder / "clear_refs", os.W_OK):
            reason = f"no permission to track the writes of process {pid}"
        for address, file in self._blocks:
            reason = reason or backing_objection(file.fd)
            if not reason and (size := self._process.page_size_at(address)) != PAGE_SIZE:
                reason = f"guest memory is mapped with pages of {size} bytes, which lose marks"
        if reason:
            raise UsageError(f"no live snapshot here: {reason}")

    def start(self) -> None:
        """Prove that marks work on guest memory, then clear all of them.

        The guest must be stopped.  The proof writes a byte of guest memory with its own value.
        """
        self._prove()
        self._clear()

    def _clear(self) -> None:
        try:
            (self._folder / "clear_refs").write_text("4")
        except OSError as error:
            raise UsageError(f"{self._folder}/clear_refs: {error.strerror}") from None

    def _prove(self) -> None:
        """Raise UsageError unless a write to each block is marked, and was not before it."""
        pages = [
            address + at
            for address, file in self._blocks
            for at in _sample(data_extents(file.fd, file.size))
        ]
        for page in pages:
            self._process.rewrite_byte(page)  # so that the page is present
        self._clear()
        clean = [self._marked(page) for page in pages]
        for page in pages:
            self._process.rewrite_byte(page)
        if any(clean) or not all(self._marked(page) for page in pages):
            raise UsageError(
                "no live snapshot here: writes to guest memory are not tracked reliably"
            )

    def _marked(self, address: int) -> bool:
        return bool(marked(_read_marks(self._folder / "pagemap", address // PAGE_SIZE, 1)).size)

    def collect(self) -> list[ByteRanges]:
        """Read the marks of all blocks, then clear them. The guest must be stopped."""
        found = [self._read(address, file.size) for address, file in self._blocks]
        self._clear()
        return found

    def _read(self, address: int, size: int) -> ByteRanges:
        parts = [np.empty((0, 2), np.int64)]
        pages = size // PAGE_SIZE
        for first in range(0, pages, READ_PAGES):
            count = min(READ_PAGES, pages - first)
            try:
                entries = _read_marks(self._folder / "pagemap", address // PAGE_SIZE + first, count)
            except OSError as error:
                raise UsageError(f"{self._folder}/pagemap: {error.strerror}") from None
            parts.append(marked(entries, first))
        rows = np.concatenate(parts)
        return ByteRanges(rows[:, 0], rows[:, 1])
