# SPDX-License-Identifier: Apache-2.0
"""A PCI device for tests: registers in BAR 0, a mappable BAR 2, doorbells, state to migrate."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from vfio_user import ConfigSpace, DmaRegion, IoEvent, PciDevice, Region, RequestError
from virtio_formats.pci import BarFlags
from virtio_formats.vfio_user import PciIrq, PciRegion

BAR0_SIZE = 0x1000
BAR2_SIZE = 0x8000
FAIL, CRASH = 0xF00, 0xF08
"""Offsets in BAR 0: a write to FAIL is refused with ENOSPC, to CRASH raises another exception."""


class Gadget(PciDevice):
    """A PCI device that records every call."""

    migratable = True

    def __init__(self, *, areas: tuple[tuple[int, int], ...] | None = None) -> None:
        self.bytes = bytearray(BAR0_SIZE)
        self.log: list[tuple[object, ...]] = []
        self.state = b"state"
        self.refuse: Callable[[str], None] = lambda what: None
        self.file = os.memfd_create("bar2")
        os.ftruncate(self.file, 0x10000)
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        bells = [
            IoEvent(self.kick, 0, 4, lambda: self.log.append(("kick", 0))),
            IoEvent(self.kick, 8, 8, lambda: self.log.append(("kick", 8)), datamatch=7),
        ]
        regions: dict[int, Region] = {
            PciRegion.BAR0: Region(BAR0_SIZE, read=self.peek, write=self.poke, io_events=bells),
            PciRegion.BAR2: Region(
                BAR2_SIZE, fd=self.file, fd_offset=0x8000, areas=areas, bar=BarFlags.MEMORY_64
            ),
            PciRegion.BAR4: Region(16, read=self.peek, bar=BarFlags.IO),
        }
        irqs: dict[int, int] = {PciIrq.INTX: 1, PciIrq.MSIX: 2048, PciIrq.ERR: 1, PciIrq.REQ: 1}
        config = ConfigSpace(vendor_id=0x1234, device_id=0x11E8, interrupt_pin=1)
        super().__init__(config, regions, irqs)

    def close(self) -> None:
        os.close(self.file)
        os.close(self.kick)

    def peek(self, offset: int, count: int) -> bytes:
        self.log.append(("read", offset, count))
        return bytes(self.bytes[offset : offset + count])

    def poke(self, offset: int, data: bytes) -> None:
        if offset == FAIL:
            raise RequestError(errno.ENOSPC, "no room")
        if offset == CRASH:
            raise ZeroDivisionError("oops")
        self.log.append(("write", offset, data))
        self.bytes[offset : offset + len(data)] = data

    def reset(self) -> None:
        self.log.append(("reset",))

    def attached(self) -> None:
        self.log.append(("attached",))

    def detached(self) -> None:
        self.log.append(("detached",))

    def dma_mapped(self, region: DmaRegion) -> None:
        self.refuse("map")
        self.log.append(("map", region.address, region.size))

    def dma_unmapped(self, region: DmaRegion) -> None:
        self.log.append(("unmap", region.address, region.size))

    def irq_state(self, index: int, start: int, count: int, masked: bool) -> None:
        self.log.append(("irq", index, start, count, masked))

    def dma_logging(self, active: bool) -> None:
        self.log.append(("logging", active))

    def save_state(self) -> bytes:
        self.refuse("save")
        return self.state

    def load_state(self, state: bytes) -> None:
        self.refuse("load")
        if not state.startswith(b"state"):
            raise RequestError(errno.EINVAL, "not a state")
        self.state = state

    def set_running(self, running: bool) -> None:
        self.refuse("continue" if running else "stop")
        self.log.append(("running", running))
