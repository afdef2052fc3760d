# SPDX-License-Identifier: Apache-2.0
"""A PCI card that copies guest memory, with MSI-X, function level reset and migration.

Write source, destination and length (64 bits each, at 0, 8 and 16 of BAR 0), then anything to the
doorbell at 24.  The status at 24 is 1 while it works, 0 when done, 2 if the memory cannot be
reached; vector 0 is signalled at the end.
"""

from __future__ import annotations

import struct
import sys

from vfio_user import BaseState, ConfigSpace, DmaError, PciDevice, Region, run_program
from vfio_user.capabilities import FunctionLevelReset, Msix, MsixState
from virtio_formats.vfio_user import PciIrq, PciRegion

DOORBELL, LENGTH_MAX = 24, 1 << 20
IDLE, BUSY, FAILED = 0, 1, 2
MSIX_SIZE = 17


class DmaEngine(PciDevice):
    """A DMA engine with one channel."""

    migratable = True

    def __init__(self) -> None:
        config = ConfigSpace(vendor_id=0x1234, device_id=0x0DAE, class_code=0x080100)
        bar = Region(4096, read=self.read, write=self.write)
        # ERR is never signalled; without it QEMU warns about error recovery.
        super().__init__(config, {PciRegion.BAR0: bar}, {PciIrq.ERR: 1})
        self.msix = Msix(self, 1, bar=PciRegion.BAR1)
        self.flr = FunctionLevelReset(self)
        self.reset()

    def reset(self) -> None:
        """Clear the registers."""
        self.registers = bytearray(32)  # source, destination, length, status

    def read(self, offset: int, count: int) -> bytes:
        """Return register bytes; those past the last register read as zero."""
        return bytes(self.registers[offset : offset + count]).ljust(count, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Store register bytes, or ring the doorbell."""
        if offset == DOORBELL and self.registers[DOORBELL] != BUSY:
            self.registers[DOORBELL] = BUSY
            self.defer(self.copy)  # the client may have to answer a message first
        elif offset + len(data) <= DOORBELL:
            self.registers[offset : offset + len(data)] = data

    def copy(self) -> None:
        """Carry the copy out, and signal its end."""
        source, destination, length = struct.unpack_from("<QQQ", self.registers)
        try:
            self.dma.write(destination, self.dma.read(source, min(length, LENGTH_MAX)))
            self.registers[DOORBELL] = IDLE
        except DmaError:
            self.registers[DOORBELL] = FAILED
        self.msix.trigger(0)

    def save_state(self) -> bytes:
        """Return the registers, the MSI-X table, and what every PCI device has."""
        return bytes(self.registers) + self.msix.state().pack() + self.base_state().pack()

    def load_state(self, state: bytes) -> None:
        """Take over what :meth:`save_state` returned; a malformed state changes nothing."""
        registers, rest = state[:32], state[32:]
        msix, base = MsixState.unpack(rest[:MSIX_SIZE]), BaseState.unpack(rest[MSIX_SIZE:])
        self.msix.check(msix)
        self.restore_base(base)
        self.msix.restore(msix)
        self.registers[:] = registers


if __name__ == "__main__":
    sys.exit(run_program(DmaEngine()))
