# SPDX-License-Identifier: Apache-2.0
"""PCI capabilities that most devices have: MSI-X, MSI, function level reset, power management.

Each is added to a device after ``PciDevice.__init__``, keeps its own registers, and follows
resets.  A client such as QEMU keeps address and data of MSI and of the MSI-X table to itself; an
interrupt goes out by the client's eventfd in any case.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from vfio_user.device import PciDevice
from vfio_user.errors import RequestError, UsageError
from vfio_user.regions import Region
from vfio_user.state import require
from virtio_formats.pci import (
    BarFlags,
    ExpressCapability,
    MsiCapability,
    MsiControl,
    MsixCapability,
    MsixControl,
    MsixTableEntry,
    PowerManagementCapability,
)
from virtio_formats.vfio_user import PciIrq

__all__ = ("FunctionLevelReset", "Msi", "Msix", "MsixState", "PowerManagement")

_PAGE = 4096
_ENTRY = MsixTableEntry.SIZE
_MASK = _ENTRY - 4  # the control word of an entry


@dataclass(frozen=True)
class MsixState:
    """The MSI-X table, and the vectors whose mask bits have been written."""

    table: bytes
    kept: tuple[int, ...] = ()

    def pack(self) -> bytes:
        """Return 17 bytes for each vector: its table entry, and whether its mask bit counts."""
        entries = range(0, len(self.table), _ENTRY)
        return b"".join(
            self.table[at : at + _ENTRY] + bytes([at // _ENTRY in self.kept]) for at in entries
        )

    @classmethod
    def unpack(cls, packed: bytes) -> MsixState:
        """Read the packed form.  Raise :class:`~vfio_user.errors.RequestError` EINVAL."""
        size = _ENTRY + 1
        require(len(packed) % size == 0, f"{len(packed)} bytes of MSI-X vectors")
        vectors = [packed[at : at + size] for at in range(0, len(packed), size)]
        require(all(one[_ENTRY] <= 1 for one in vectors), "MSI-X vector flags")
        kept = tuple(number for number, one in enumerate(vectors) if one[_ENTRY])
        return cls(b"".join(one[:_ENTRY] for one in vectors), kept)


class Msix:
    """MSI-X with *vectors* vectors: capability, table and pending bits in a BAR of its own.

    PCI Local Bus Specification 3.0, section 6.8.2.  A client may keep the table to itself (QEMU
    does, and forwards reads of the pending bits only), so a vector is masked by its entry only
    once something has been written there.
    """

    def __init__(self, device: PciDevice, vectors: int, *, bar: int) -> None:
        device.irqs.add(PciIrq.MSIX, vectors)
        self.vectors = vectors
        self._device, self._irqs, self._config = device, device.irqs, device.config
        self._pba = -(-vectors * _ENTRY // _PAGE) * _PAGE
        self._pba_size = -(-vectors // 64) * 8
        size = 1 << (self._pba + self._pba_size - 1).bit_length()
        region = Region(size, read=self._read, write=self._write, bar=BarFlags.MEMORY_32)
        device.add_region(bar, region)
        writable = int(MsixControl.ENABLE | MsixControl.FUNCTION_MASK).to_bytes(2, "little")
        self.offset = device.config.add_capability(
            MsixCapability(control=vectors - 1, table=bar, pba=self._pba | bar).build(),
            bytes(2) + writable,
        )
        self._table, self._kept = bytearray(), set[int]()
        self._clear()
        device.config.on_write(self.offset + 2, 2, lambda offset, size: self._control_changed())
        device.at_reset(self._clear)

    @property
    def enabled(self) -> bool:
        """Return whether the driver uses MSI-X."""
        return bool(self._config.word(self.offset + 2) & MsixControl.ENABLE)

    def trigger(self, vector: int) -> bool:
        """Signal an edge on *vector* if MSI-X is enabled.

        Return False if it stays pending, or MSI-X is off.
        """
        return self.enabled and self._irqs.trigger(PciIrq.MSIX, vector)

    def state(self) -> MsixState:
        """Return the table; pending bits and masks are in the device's ``base_state``."""
        return MsixState(bytes(self._table), tuple(sorted(self._kept)))

    def check(self, state: MsixState) -> None:
        """Raise :class:`~vfio_user.errors.RequestError` EINVAL for a state of another table."""
        require(len(state.table) == len(self._table), f"{len(state.table)} bytes of MSI-X table")
        require(all(0 <= vector < self.vectors for vector in state.kept), "no such vector")

    def restore(self, state: MsixState) -> None:
        """Take over what :meth:`state` returned.

        Raise :class:`~vfio_user.errors.RequestError` EINVAL, nothing changed then.
        """
        self.check(state)
        self._table[:], self._kept = state.table, set(state.kept)
        for vector in range(self.vectors):
            self._apply(vector)
        self._control_changed()

    def _clear(self) -> None:
        self._kept.clear()
        self._table[:] = MsixTableEntry(address=0, data=0, control=1).build() * self.vectors

    def _control_changed(self) -> None:
        control = self._config.word(self.offset + 2)
        self._irqs.hold(PciIrq.MSIX, bool(control & MsixControl.FUNCTION_MASK))

    def _read(self, offset: int, count: int) -> bytes:
        bits = sum(on << n for n, on in enumerate(self._irqs.pending(PciIrq.MSIX)))
        image = bytes(self._table).ljust(self._pba, b"\0") + bits.to_bytes(self._pba_size, "little")
        return image[offset : offset + count].ljust(count, b"\0")

    def _write(self, offset: int, data: bytes) -> None:
        if offset % 4 or len(data) % 4:
            raise RequestError(errno.EINVAL, f"MSI-X write of {len(data)} bytes at {offset:#x}")
        end = min(offset + len(data), len(self._table))
        if offset >= end:
            return
        self._table[offset:end] = data[: end - offset]
        for vector in range(offset // _ENTRY, -(-end // _ENTRY)):
            if offset <= vector * _ENTRY + _MASK < end:
                self._kept.add(vector)
                self._apply(vector)

    def _apply(self, vector: int) -> None:
        masked = vector in self._kept and bool(self._table[vector * _ENTRY + _MASK] & 1)
        self._irqs.set_mask(PciIrq.MSIX, vector, masked)


class Msi:
    """MSI with 1, 2, 4, 8, 16 or 32 *vectors*.  PCI Local Bus Specification 3.0, section 6.8.1."""

    def __init__(self, device: PciDevice, vectors: int = 1) -> None:
        if vectors not in (1, 2, 4, 8, 16, 32):
            raise UsageError(f"{vectors} MSI vectors")
        device.irqs.add(PciIrq.MSI, vectors)
        self.vectors = vectors
        self._irqs, self._config = device.irqs, device.config
        control = MsiControl.ADDRESS_64 | vectors.bit_length() - 1 << 1
        writable = int(MsiControl.ENABLE | MsiControl.MULTIPLE_ENABLE).to_bytes(2, "little")
        self.offset = device.config.add_capability(
            MsiCapability(control=int(control)).build(),
            bytes(2) + writable + b"\xfc" + b"\xff" * 7 + b"\xff\xff",
        )

    @property
    def enabled(self) -> bool:
        """Return whether the driver uses MSI."""
        return bool(self._config.word(self.offset + 2) & MsiControl.ENABLE)

    def trigger(self, vector: int = 0) -> bool:
        """Signal *vector* if MSI is enabled; return False if it stays pending, or MSI is off.

        If fewer vectors are granted than offered, use the last granted one in place of the others.
        """
        granted = 1 << (self._config.word(self.offset + 2) >> 4 & 7)
        return self.enabled and self._irqs.trigger(PciIrq.MSI, min(vector, granted - 1))


class FunctionLevelReset:
    """The PCI Express capability of a plain endpoint, whose FLR bit resets the function.

    PCI Express Base Specification 3.1, section 6.6.2.
    """

    def __init__(self, device: PciDevice) -> None:
        self._device = device
        writable = bytearray(ExpressCapability.SIZE)
        writable[8:10] = b"\xff\xff"  # Device Control
        self.offset = device.config.add_capability(ExpressCapability().build(), bytes(writable))
        device.config.on_write(self.offset + 8, 2, lambda offset, size: self._written())

    def _written(self) -> None:
        data, at = self._device.config.data, self.offset + 9
        if data[at] & 0x80:
            data[at] &= 0x7F  # reads as zero
            self._device.request_reset()


class PowerManagement:
    """Power management with D0 and D3hot; the way back from D3hot resets the function.

    PCI Bus Power Management Interface Specification 1.2, section 5.4.1 (No_Soft_Reset is clear).
    """

    def __init__(self, device: PciDevice) -> None:
        self._device = device
        self._before = 0
        self.offset = device.config.add_capability(
            PowerManagementCapability().build(), b"\0\0\0\0\x03\0\0\0"
        )
        device.config.on_write(self.offset + 4, 1, lambda offset, size: self._written())
        device.at_reset(self._clear)

    @property
    def power_state(self) -> int:
        """Return the power state: 0 for D0, 3 for D3hot."""
        return self._device.config.data[self.offset + 4] & 3

    def _clear(self) -> None:
        self._before = 0

    def _written(self) -> None:
        before, self._before = self._before, self.power_state
        if before == 3 and not self._before:
            self._device.request_reset()
