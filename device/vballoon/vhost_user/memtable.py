# SPDX-License-Identifier: Apache-2.0
"""The front-end's memory regions, and the guest memory that they make up.

"Memory access", "VHOST_USER_SET_MEM_TABLE", "VHOST_USER_ADD_MEM_REG" and
"VHOST_USER_REM_MEM_REG" of vhost-user.rst, QEMU 11.1.3.  Every change is worked out first and
takes effect only when nothing can fail any more: a refused message leaves the table as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from vballoon.errors import ProtocolError
from vballoon.memory import GuestMemory, MemoryRegion
from vballoon.vhost_user.session import Fds
from vballoon.vhost_user.slots import Slots
from vballoon.vhost_user.state import RegionState
from virtio_formats.vhost_user import VhostUserMemoryRegion

__all__ = ("MAX_MEM_SLOTS", "MemoryTable")

MAX_MEM_SLOTS = 256
"""Regions that a front-end may have mapped at a time: as many as QEMU can plug memory modules.

Each costs two descriptors (the region's and the mapping's), and 1024 is what a process usually
may have."""


class MemoryTable:
    """The current regions; ``memory`` is the guest memory that they make up."""

    def __init__(self) -> None:
        self.memory = GuestMemory()

    def replace(self, regions: list[VhostUserMemoryRegion], fds: Fds) -> None:
        """SET_MEM_TABLE: replace all earlier regions by these."""
        if len(regions) != len(fds):
            raise ProtocolError("fds-mismatch", f"{len(regions)} regions, {len(fds)} descriptors")
        made: list[MemoryRegion] = []
        try:
            made.extend(_map(region, fds) for region in regions)
            memory = _table(made)
        except Exception:
            for region in made:
                region.close()
            raise
        self._switch(memory)

    def state(self, slots: Slots) -> tuple[RegionState, ...]:
        """Return the regions as values; their descriptors get *slots*."""
        return tuple(
            RegionState(
                guest_address=region.guest_phys_addr,
                size=region.size,
                user_address=region.userspace_addr,
                mmap_offset=region.file_offset,
                slot=slots.slot(region, region.fd),
            )
            for region in self.memory.regions
        )

    def add(self, region: VhostUserMemoryRegion, fds: Fds) -> None:
        """ADD_MEM_REG: add a region."""
        if len(self.memory.regions) >= MAX_MEM_SLOTS:
            raise ProtocolError("memory-slots", f"more than {MAX_MEM_SLOTS} regions")
        made = _map(region, fds)
        try:
            memory = _table([*self.memory.regions, made])
        except Exception:
            made.close()
            raise
        self._switch(memory)

    def remove(self, region: VhostUserMemoryRegion) -> None:
        """REM_MEM_REG: remove the region with this guest address, user address and size."""
        wanted = (region.guest_address, region.user_address, region.size)
        keep = [
            r
            for r in self.memory.regions
            if (r.guest_phys_addr, r.userspace_addr, r.size) != wanted
        ]
        if len(keep) == len(self.memory.regions):
            raise ProtocolError("memory-region-unknown", f"{wanted[0]:#x}+{wanted[2]:#x}")
        self._switch(_table(keep))

    def adopt(self, other: MemoryTable, regions: Sequence[RegionState], slots: Slots) -> None:
        """Take the memory of *other* over, which was made from *regions*."""
        memory, other.memory = other.memory, GuestMemory()
        self._switch(memory)
        by_address = {region.guest_address: region.slot for region in regions}
        for region in memory.regions:
            slots.keep(region, by_address[region.guest_phys_addr])

    def clear(self) -> None:
        """Forget every region."""
        self._switch(GuestMemory())

    def _switch(self, memory: GuestMemory) -> None:
        """Use *memory* from now on, and close the regions that are not in it any more."""
        kept = set(map(id, memory.regions))
        memory.dirty_log = self.memory.dirty_log
        gone = [r for r in self.memory.regions if id(r) not in kept]
        self.memory = memory
        for region in gone:
            region.close()


def _map(region: VhostUserMemoryRegion, fds: Fds) -> MemoryRegion:
    return MemoryRegion.map(
        guest_phys_addr=region.guest_address,
        size=region.size,
        file_offset=region.mmap_offset,
        fd=fds.take(),
        userspace_addr=region.user_address,
    )


def _table(regions: list[MemoryRegion]) -> GuestMemory:
    """Guest memory of *regions*, which may overlap in neither address space."""
    by_user = sorted(regions, key=lambda r: r.userspace_addr)
    for low, high in pairwise(by_user):
        if low.userspace_addr + low.size > high.userspace_addr:
            raise ProtocolError("memory-region-overlap", f"user addresses: {low} {high}")
    return GuestMemory(regions)
