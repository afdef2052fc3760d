# SPDX-License-Identifier: Apache-2.0
"""The BAR of the MSI-X table and its pending bits.

PCI Local Bus Specification 3.0, section 6.8.2.  Delivery goes through the client's eventfds, so
addresses and data of the table are kept but never used.  A client may keep the table to itself
(QEMU does, and forwards reads of the pending bits only); therefore a vector is masked by the mask
bit of its entry only once something has been written there.
"""

from __future__ import annotations

import errno

from vballoon.virtio_pci.layout import MsixLayout
from vfio_user import IrqTable, RequestError
from virtio_formats.pci import MsixTableEntry
from virtio_formats.vfio_user import PciIrq

__all__ = ("MsixBar",)

_CONTROL = MsixTableEntry.SIZE - 4


class MsixBar:
    """Serves reads and writes of the BAR."""

    def __init__(self, layout: MsixLayout) -> None:
        self.layout = layout
        self.irqs: IrqTable | None = None
        self._table = bytearray()
        self.reset()

    def reset(self) -> None:
        """Every entry zero and masked."""
        self.kept: set[int] = set()
        """Vectors whose mask bit has been written: the client does not keep it to itself."""
        self._table[:] = MsixTableEntry(address=0, data=0, control=1).build() * self.layout.vectors

    @property
    def table(self) -> bytes:
        """The entries as they are."""
        return bytes(self._table)

    def restore(self, table: bytes, kept: set[int]) -> None:
        """Entries of another life, and which vectors they mask or not."""
        self._table[:], self.kept = table, kept
        for vector in kept:
            self._apply(vector)

    def read(self, offset: int, count: int) -> bytes:
        """*count* bytes at *offset*; what is neither table nor pending bits reads as zero."""
        image = bytes(self._table).ljust(self.layout.pba, b"\0") + self._pending()
        return image[offset : offset + count].ljust(count, b"\0")

    def _pending(self) -> bytes:
        bits = 0
        if self.irqs is not None:
            for vector, pending in enumerate(self.irqs.pending(PciIrq.MSIX)):
                bits |= pending << vector
        return bits.to_bytes(self.layout.pba_size, "little")

    def write(self, offset: int, data: bytes) -> None:
        """Store into the table; the pending bits are read-only.

        Raises :class:`~vfio_user.RequestError` EINVAL for a write that is not of whole aligned
        32-bit words.
        """
        if offset % 4 or len(data) % 4:
            raise RequestError(errno.EINVAL, f"MSI-X write of {len(data)} bytes at {offset:#x}")
        end = min(offset + len(data), len(self._table))
        if offset >= end:
            return
        self._table[offset:end] = data[: end - offset]
        size = MsixTableEntry.SIZE
        for vector in range(offset // size, -(-end // size)):
            if offset <= vector * size + _CONTROL < end:
                self.kept.add(vector)
                self._apply(vector)

    def _apply(self, vector: int) -> None:
        if self.irqs is not None:
            control = self._table[vector * MsixTableEntry.SIZE + _CONTROL]
            self.irqs.set_mask(PciIrq.MSIX, vector, bool(control & 1))
