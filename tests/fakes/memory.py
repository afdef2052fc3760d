# SPDX-License-Identifier: Apache-2.0
"""Guest memory for tests: regions of one memfd, or memory that is reached by messages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count

import numpy as np

from vballoon.errors import MemoryFault
from vballoon.memory import GuestMemory, MemoryRegion

PAGE = 4096
_names = count()
_files: list[tuple[int, int]] = []  # descriptor, inode


def _noted(fd: int) -> int:
    _files.append((fd, os.fstat(fd).st_ino))
    return fd


def memfd(size: int, flags: int = os.MFD_CLOEXEC) -> int:
    """Return a memfd of *size* bytes; the caller owns the descriptor."""
    fd = os.memfd_create(f"guest{next(_names)}", flags)
    os.ftruncate(fd, size)
    return _noted(fd)


def make_memory(
    *regions: tuple[int, int], file_offset: int = 0, fd: int | None = None
) -> GuestMemory:
    """Return mapped guest memory; *regions* are (guest-physical address, size) in one file.

    The default is 16 MiB at 0.  The regions follow each other in the file from *file_offset* on.
    The userspace address of a region is its guest address plus 2^46.  The file is *fd*, which is
    then owned by the memory, or else a new memfd.
    """
    regions = regions or ((0, 16 << 20),)
    if fd is None:
        fd = memfd(file_offset + sum(size for _, size in regions))
    made, offset = [], file_offset
    for addr, size in regions:
        made.append(
            MemoryRegion.map(
                guest_phys_addr=addr,
                size=size,
                file_offset=offset,
                fd=_noted(os.dup(fd)),
                userspace_addr=addr + (1 << 46),
            )
        )
        offset += size
    os.close(fd)
    return GuestMemory(made)


@contextmanager
def closed_at_the_end() -> Iterator[None]:
    """Close everything that :func:`make_memory` and :func:`memfd` create inside the block."""
    _files.clear()
    yield
    for fd, inode in _files:
        with suppress(OSError):  # already closed by its owner
            if os.fstat(fd).st_ino == inode:
                os.close(fd)


class MessageMemory:
    """Answer DMA reads and writes from a mapped table, like a vfio-user client.

    ``reads`` and ``writes`` count messages; addresses in ``refuse`` fault.
    """

    def __init__(self, backing: GuestMemory) -> None:
        self.backing = backing
        self.reads = self.writes = 0
        self.refuse: set[int] = set()

    def dma_read(self, addr: int, size: int) -> bytes:
        self.reads += 1
        if addr in self.refuse:
            raise MemoryFault("dma-refused", f"{addr:#x}")
        return self.backing.read(addr, size)

    def dma_write(self, addr: int, data: bytes) -> None:
        self.writes += 1
        if addr in self.refuse:
            raise MemoryFault("dma-refused", f"{addr:#x}")
        self.backing.write(addr, data)


def by_messages(backing: GuestMemory) -> tuple[GuestMemory, MessageMemory]:
    """Return the memory of *backing* without a mapping, and the object that answers messages."""
    peer = MessageMemory(backing)
    return (
        GuestMemory(
            MemoryRegion(guest_phys_addr=r.guest_phys_addr, size=r.size, remote=peer)
            for r in backing.regions
        ),
        peer,
    )


class Arena:
    """Allocate guest memory in ascending order, without reuse."""

    def __init__(self, start: int, size: int) -> None:
        self.next, self.end = start, start + size

    def take(self, size: int, align: int = 16) -> int:
        """Return the address of *size* newly allocated bytes."""
        addr = self.next + -self.next % align
        self.next = addr + size
        assert self.next <= self.end, "the arena is used up"
        return addr


def column(values: list[int]) -> np.ndarray:
    """Return *values* as a uint64 array."""
    return np.array(values, np.uint64)
