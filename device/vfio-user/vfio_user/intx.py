# SPDX-License-Identifier: Apache-2.0
"""The INTx pin of a function: a level, shown in the Status register, gated by the Command register.

PCI Local Bus Specification 3.0, sections 6.2.2 and 6.2.3: Interrupt Status reflects the state of
the interrupt whether or not Interrupt Disable keeps it from being signalled.
"""

from __future__ import annotations

from vfio_user.config import ConfigSpace
from vfio_user.irqs import IrqTable
from virtio_formats.pci import Command

__all__ = ("IntxPin",)


class IntxPin:
    """Drives INTx of the function whose *config* and *irqs* these are."""

    def __init__(self, config: ConfigSpace, irqs: IrqTable) -> None:
        self._config = config
        self._irqs = irqs
        self._level = False
        config.on_write(0x04, 2, lambda offset, size: self._update())

    @property
    def level(self) -> bool:
        """Return whether the function wants attention."""
        return self._level

    def set(self, level: bool) -> None:
        """Assert or release the pin."""
        self._level = level
        self._update()

    def reset(self) -> None:
        """Release the pin; configuration space has been reset before."""
        self.set(False)

    def _update(self) -> None:
        self._config.interrupt_status = self._level
        self._irqs.set_intx(self._level and not self._config.command & Command.INTX_DISABLE)
