# SPDX-License-Identifier: Apache-2.0
"""Notifications to the driver: MSI-X while it is enabled, else INTx with the ISR status.

Virtio 1.4, *Used Buffer Notifications*, *Notification of Device Configuration Changes* and *ISR
status capability*.
"""

from __future__ import annotations

from vfio_user import ConfigSpace, IntxPin, IrqTable
from virtio_formats.pci import MsixControl
from virtio_formats.vfio_user import PciIrq
from virtio_formats.virtio.pci import NO_VECTOR, IsrStatus

__all__ = ("Interrupts",)


class Interrupts:
    """Which way an interrupt goes.  *msix* is where the MSI-X capability is, 0 without one."""

    def __init__(self, config: ConfigSpace, irqs: IrqTable, intx: IntxPin, msix: int) -> None:
        self._config = config
        self._irqs = irqs
        self._intx = intx
        self._control = msix + 2 if msix else 0
        self._isr = IsrStatus(0)
        if msix:
            config.on_write(self._control, 2, self._changed)

    @property
    def msix_enabled(self) -> bool:
        """Whether the driver uses MSI-X."""
        return bool(self._msix_control & MsixControl.ENABLE)

    @property
    def _msix_control(self) -> int:
        return self._config.word(self._control) if self._control else 0

    def queue(self, vector: int) -> None:
        """Send a used buffer notification on *vector*."""
        self._send(vector, IsrStatus.QUEUE)

    def config_change(self, vector: int) -> None:
        """Send a configuration change notification on *vector*."""
        self._isr |= IsrStatus.CONFIG  # with MSI-X, too
        self._send(vector, IsrStatus.CONFIG)

    def _send(self, vector: int, reason: IsrStatus) -> None:
        if self.msix_enabled:
            if vector != NO_VECTOR:
                self._irqs.trigger(PciIrq.MSIX, vector)
            return
        self._isr |= reason
        self._update()

    def read_isr(self) -> int:
        """Return the ISR status; clear it and deassert INTx."""
        value, self._isr = int(self._isr), IsrStatus(0)
        self._update()
        return value

    @property
    def isr(self) -> IsrStatus:
        """The ISR status, looked at without clearing it."""
        return self._isr

    def restore(self, isr: IsrStatus) -> None:
        """Restore the ISR status; configuration space has been restored before."""
        self._isr = isr
        self._changed(0, 0)

    def reset(self) -> None:
        """As after power-on."""
        self._isr = IsrStatus(0)
        self._irqs.clear_pending()
        self._changed(0, 0)

    def _changed(self, offset: int, size: int) -> None:
        self._irqs.hold(PciIrq.MSIX, bool(self._msix_control & MsixControl.FUNCTION_MASK))
        self._update()

    def _update(self) -> None:
        self._intx.set(bool(self._isr) and not self.msix_enabled)
