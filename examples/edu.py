# SPDX-License-Identifier: Apache-2.0
"""A PCI card without virtio, on the package ``vfio_user`` alone.

It follows the teaching device "edu" of QEMU (docs/specs/edu.rst): an identification register, a
register that inverts its value, a factorial register, interrupts, and DMA between guest memory and
a buffer on the card.

    python examples/edu.py --socket-path edu.sock
    qemu-system-x86_64 … -device
        '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"edu.sock"}}'
"""

from __future__ import annotations

import math
import sys

from vfio_user import ConfigSpace, DmaError, PciDevice, Region, run_program
from virtio_formats.vfio_user import PciIrq, PciRegion

IDENTITY = 0x010000ED
BAR_SIZE = 1 << 20
BUFFER, BUFFER_SIZE = 0x40000, 4096
ID, LIVENESS, FACTORIAL, STATUS, IRQ_STATUS = 0x00, 0x04, 0x08, 0x20, 0x24
IRQ_RAISE, IRQ_ACK = 0x60, 0x64
DMA_SOURCE, DMA_DESTINATION, DMA_COUNT, DMA_COMMAND = 0x80, 0x88, 0x90, 0x98
IRQ_ON_FACTORIAL = 0x80
RUN, FROM_CARD, DMA_INTERRUPT = 1, 2, 4
FACTORIAL_IRQ, DMA_IRQ = 0x001, 0x100


class Edu(PciDevice):
    """The edu card as a vfio-user device."""

    def __init__(self) -> None:
        config = ConfigSpace(
            vendor_id=0x1234,
            device_id=0x11E8,
            revision_id=0x10,
            class_code=0x00FF00,
            interrupt_pin=1,
            express=False,
        )
        bar = Region(BAR_SIZE, read=self.read, write=self.write)
        self.reset_registers()
        super().__init__(config, {PciRegion.BAR0: bar}, {PciIrq.INTX: 1, PciIrq.ERR: 1})

    def reset_registers(self) -> None:
        """Set the registers to their values after power-on."""
        self.registers: dict[int, int] = {ID: IDENTITY}
        self.buffer = bytearray(BUFFER_SIZE)

    def reset(self) -> None:
        """Reset the device."""
        self.reset_registers()

    def read(self, offset: int, count: int) -> bytes:
        """Return a register; other offsets read as all ones."""
        value = self.registers.get(offset, 0 if offset <= DMA_COMMAND else -1)
        return (value & ((1 << 8 * count) - 1)).to_bytes(count, "little")

    def write(self, offset: int, data: bytes) -> None:
        """Write a register and carry out its function."""
        value = int.from_bytes(data, "little")
        match offset:
            case 0x04:
                self.registers[LIVENESS] = ~value & 0xFFFFFFFF
            case 0x08:
                self.registers[FACTORIAL] = math.factorial(min(value, 1000)) & 0xFFFFFFFF
                if self.registers.get(STATUS, 0) & IRQ_ON_FACTORIAL:
                    self.interrupt(FACTORIAL_IRQ)
            case 0x20:
                self.registers[STATUS] = value & IRQ_ON_FACTORIAL
            case 0x60:
                self.interrupt(value)
            case 0x64:
                self.registers[IRQ_STATUS] = self.registers.get(IRQ_STATUS, 0) & ~value
                self.intx.set(bool(self.registers[IRQ_STATUS]))
            case 0x80 | 0x88 | 0x90:
                self.registers[offset] = value
            case 0x98 if value & RUN:
                self.registers[DMA_COMMAND] = value
                self.defer(self.transfer)  # memory may need a message to the client

    def interrupt(self, reason: int) -> None:
        """Raise INTx until every reason is acknowledged."""
        self.registers[IRQ_STATUS] = self.registers.get(IRQ_STATUS, 0) | reason
        self.intx.set(bool(self.registers[IRQ_STATUS]))

    def transfer(self) -> None:
        """Carry out the DMA and clear the RUN bit when it is done."""
        command = self.registers.get(DMA_COMMAND, 0)
        source, destination, count = (
            self.registers.get(at, 0) for at in (DMA_SOURCE, DMA_DESTINATION, DMA_COUNT)
        )
        start = (source if command & FROM_CARD else destination) - BUFFER
        if start >= 0 and start + count <= BUFFER_SIZE:
            try:
                if command & FROM_CARD:
                    self.dma.write(destination, bytes(self.buffer[start : start + count]))
                else:
                    self.buffer[start : start + count] = self.dma.read(source, count)
            except DmaError as error:
                print(f"edu: {error}", file=sys.stderr)
        self.registers[DMA_COMMAND] = command & ~RUN
        if command & DMA_INTERRUPT:
            self.interrupt(DMA_IRQ)


if __name__ == "__main__":
    sys.exit(run_program(Edu()))
