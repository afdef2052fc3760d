# SPDX-License-Identifier: Apache-2.0
"""What a PCI device is to this package: the class to derive a device from.

A device outlives its client: descriptors, DMA regions and interrupt eventfds go when the client
goes, registers and configuration space stay.  All calls come from one thread.

    class Doorbell(PciDevice):
        def __init__(self) -> None:
            config = ConfigSpace(vendor_id=0x1AF4, device_id=0x10F0, interrupt_pin=1)
            bar = Region(4096, read=self.peek, write=self.poke)
            super().__init__(config, {PciRegion.BAR0: bar}, {PciIrq.INTX: 1})
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable, Mapping

from vfio_user.config import ConfigSpace
from vfio_user.descriptors import Descriptors
from vfio_user.dma import DmaRegion, DmaTable
from vfio_user.errors import RequestError, UsageError
from vfio_user.intx import IntxPin
from vfio_user.irqs import IrqTable
from vfio_user.migration import MigrationMachine
from vfio_user.regions import Region
from vfio_user.state import BaseState
from virtio_formats.vfio_user import PCI_NUM_REGIONS, DeviceFlags, PciRegion

__all__ = ("PciDevice",)

log = logging.getLogger(__name__)

_EMPTY = Region(0)


class PciDevice:
    """A PCI function.  Override what the device does; everything has a harmless default.

    *regions* maps indices of :class:`~virtio_formats.vfio_user.PciRegion` to regions (BARs are
    entered into *config* here); *irqs* says how many vectors each interrupt index has.
    Edges are signalled with ``irqs.trigger``, the level of INTx with ``intx.set``.
    ``migratable`` devices offer the migration states and must give and take their state.
    """

    migratable = False

    def __init__(
        self, config: ConfigSpace, regions: Mapping[int, Region], irqs: Mapping[int, int]
    ) -> None:
        self.config = config
        self.descriptors = Descriptors()
        """The client's descriptors, by slot."""
        self.dma = DmaTable(self.descriptors)
        self.dma.on_map = self.dma_mapped
        self.dma.on_unmap = self.dma_unmapped
        self.irqs = IrqTable(irqs, self.descriptors)
        self.irqs.on_state = self.irq_state
        self.intx = IntxPin(config, self.irqs)
        self.migration = MigrationMachine(self)
        self.regions = [regions.get(index, _EMPTY) for index in range(PCI_NUM_REGIONS)]
        if self.regions[PciRegion.CONFIG].size or set(regions) - set(PciRegion):
            raise UsageError(f"regions {sorted(regions)}: BARs, ROM and VGA only")
        self.regions[PciRegion.CONFIG] = Region(config.size, read=config.read, write=config.write)
        for index in range(6):
            if self.regions[index].size:
                config.add_bar(index, self.regions[index])
        self.client_error: str | None = None
        """Why the last client disconnected, for :meth:`detached`; None for an orderly end."""
        self._deferred: deque[Callable[[], None]] = deque()
        self._wake: Callable[[], None] | None = None

    device_flags = DeviceFlags.PCI | DeviceFlags.RESET

    # -- for a device to override -----------------------------------------------------------------

    def reset(self) -> None:
        """Device reset: registers as after power-on (configuration space is done already)."""

    def attached(self) -> None:
        """A client has connected and negotiated."""

    def detached(self) -> None:
        """The client has gone; its memory and its eventfds are let go of next."""

    def dma_mapped(self, region: DmaRegion) -> None:
        """A piece of client memory can be used from now on."""

    def dma_unmapped(self, region: DmaRegion) -> None:
        """A piece of client memory must not be used any more when this returns."""

    def dma_logging(self, active: bool) -> None:
        """The client wants to know which of its memory the device writes, or no longer.

        What goes through ``dma.write`` is logged there; a device that writes mapped memory
        itself must call ``dma.log.mark``.
        """

    def irq_state(self, index: int, start: int, count: int, masked: bool) -> None:
        """The client masked or unmasked vectors."""

    def save_state(self) -> bytes:
        """The device's state for migration; it stands still meanwhile."""
        raise RequestError(errno.EINVAL, "the device does not migrate")

    def load_state(self, state: bytes) -> None:
        """Take a state over; raises :class:`~vfio_user.errors.RequestError` if malformed."""
        raise RequestError(errno.EINVAL, "the device does not migrate")

    def set_running(self, running: bool) -> None:
        """Stand still (no DMA, no interrupts), or go on."""

    # -- for a device to use ----------------------------------------------------------------------

    def defer(self, work: Callable[[], None]) -> None:
        """Do *work* once the command being served has been answered.

        This is the place for DMA: a client may wait for the answer to a region access before it
        looks at the DMA messages that the access caused (QEMU 11.1 holds its global lock then).
        """
        self._deferred.append(work)
        if self._wake is not None:
            self._wake()

    def base_state(self) -> BaseState:
        """Return configuration space, INTx, and pending and masked vectors: the base's own state.

        A device's :meth:`save_state` can wrap its packed form.
        """
        held, irqs = self.irqs.function_state()
        return BaseState(config=bytes(self.config.data), intx=self.intx.level, held=held, irqs=irqs)

    def check_base(self, state: BaseState) -> None:
        """Raise :class:`~vfio_user.errors.RequestError` for a state of another device."""
        self.config.check(state.config)
        self.irqs.check_function(state.held, state.irqs)

    def restore_base(self, state: BaseState) -> None:
        """Take over what :meth:`base_state` returned.  No hook of configuration space runs.

        Raise :class:`~vfio_user.errors.RequestError` EINVAL, nothing changed then.
        """
        self.check_base(state)
        self.config.restore(state.config)
        self.irqs.restore_function(state.held, state.irqs)
        self.intx.set(state.intx)

    # -- for sessions and servers -----------------------------------------------------------------

    def on_deferred(self, wake: Callable[[], None] | None) -> None:
        """Call *wake* whenever there is deferred work to :meth:`run_deferred`."""
        self._wake = wake

    def run_deferred(self) -> None:
        """Do what was deferred until now; what that defers in turn waits for the next call."""
        for _ in range(len(self._deferred)):
            work = self._deferred.popleft()
            try:
                work()
            except Exception as error:
                # A device that fails must not take the server along.
                log.error("deferred work failed: %s: %s", type(error).__name__, error)

    def full_reset(self) -> None:
        """DEVICE_RESET: configuration space, pending interrupts, migration state, registers."""
        self.config.reset()
        self.irqs.clear_pending()
        self.intx.reset()
        self.stop_logging()
        self.migration.reset()
        self.reset()

    def stop_logging(self) -> None:
        """End DMA logging, if it is on."""
        if self.dma.log.active:
            self.dma.log.stop()
            self.dma_logging(False)

    def disconnect(self, error: str | None = None) -> None:
        """Unmap the client's memory and close its descriptors: it has disconnected.

        *error* says why, None for an orderly end.
        """
        self.client_error = error
        self.dma.channel = None
        self.detached()
        self.dma.clear()
        self.stop_logging()
        self.irqs.close()
        self.migration.reset()
