# SPDX-License-Identifier: Apache-2.0
"""BAR 0: the virtio structures, a page each, and which page an access is for.

Virtio 1.4, *Virtio Structure PCI Capabilities*, *ISR status capability*, *Device-specific
configuration* and *Notification structure layout*.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vballoon.memory import PAGE_SIZE
from vballoon.virtio_pci import layout
from vfio_user import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vballoon.virtio import VirtioDevice
    from vballoon.virtio_pci.interrupts import Interrupts
    from vballoon.virtio_pci.registers import CommonRegisters

__all__ = ("DeviceConfig", "Structures")


class DeviceConfig:
    """The device's configuration space as the driver sees it, and its generation."""

    def __init__(self, device: VirtioDevice) -> None:
        self._device = device
        self._generation = 0
        self._shown = device.read_config()

    def read(self, offset: int, count: int) -> bytes:
        """Return *count* bytes at *offset*, with zeroes after the end."""
        self._refresh()
        return self._shown[offset : offset + count].ljust(count, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Handle a write of the driver; bytes after the end are dropped."""
        data = data[: max(len(self._shown) - offset, 0)]
        if data:
            self._device.write_config(offset, data)

    def generation(self) -> int:
        """config_generation: another one when the configuration has changed since the last look."""
        self._refresh()
        return self._generation

    def restore(self, generation: int) -> None:
        """Change the generation, because a restored driver may have read another configuration."""
        self._generation, self._shown = (generation + 1) & 0xFF, self._device.read_config()

    def _refresh(self) -> None:
        now = self._device.read_config()
        if now != self._shown:
            self._shown = now
            self._generation = (self._generation + 1) & 0xFF


class Structures:
    """Serve accesses to the BAR.  *kick(index)* is called for doorbells."""

    def __init__(
        self,
        registers: CommonRegisters,
        interrupts: Interrupts,
        config: DeviceConfig,
        kick: Callable[[int], None],
    ) -> None:
        self._registers = registers
        self._interrupts = interrupts
        self._config = config
        self._kick = kick

    def read(self, offset: int, count: int) -> bytes:
        """*count* bytes at *offset*; raises :class:`~vfio_user.RequestError` EINVAL."""
        page, within = offset & -PAGE_SIZE, offset % PAGE_SIZE
        if page == layout.COMMON_PAGE:
            return self._registers.read(within, count)
        if page == layout.ISR_PAGE:
            # The status is one byte; bytes after it read as zero and clear nothing.
            return (b"\0" if within else bytes([self._interrupts.read_isr()])).ljust(count, b"\0")
        if page == layout.DEVICE_PAGE:
            return self._config.read(within, count)
        return bytes(count)

    def write(self, offset: int, data: bytes) -> None:
        """Store *data* at *offset*, or ring; raises :class:`~vfio_user.RequestError` EINVAL."""
        page, within = offset & -PAGE_SIZE, offset % PAGE_SIZE
        if page == layout.NOTIFY_PAGE:
            self._doorbell(within)
        elif page == layout.COMMON_PAGE:
            self._registers.write(within, data)
        elif page == layout.DEVICE_PAGE:
            self._config.write(within, data)

    def _doorbell(self, within: int) -> None:
        index, rest = divmod(within, layout.NOTIFY_MULTIPLIER)
        if rest or index >= len(self._registers.queues):
            raise RequestError(errno.EINVAL, f"no doorbell at {within:#x}")
        self._kick(index)
