# SPDX-License-Identifier: Apache-2.0
"""A modern virtio PCI function that carries any virtio device over vfio-user.

Virtio 1.4, *Virtio Over PCI Bus*.  Register accesses only note what is to be done; starting and
serving queues, which may need guest memory by message, happens in deferred work.  While that work
waits for the client's memory, further accesses are served: a reset that arrives then is noted,
and device_status keeps its value until the work has ended (the driver must wait for it to read 0).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from functools import partial

from vballoon.errors import MemoryFault, PeerError, ProtocolError, QueueError
from vballoon.memory import GuestMemory
from vballoon.native import guard
from vballoon.virtio import (
    DeviceQueue,
    QueueStatus,
    RingRecord,
    RingSet,
    TransportEvents,
    VirtioDevice,
    check_record,
)
from vballoon.virtio_pci import layout
from vballoon.virtio_pci.hooks import ConfigHooks
from vballoon.virtio_pci.interrupts import Interrupts
from vballoon.virtio_pci.memory import ClientMemory
from vballoon.virtio_pci.msix import MsixBar
from vballoon.virtio_pci.registers import CommonRegisters, QueueRegisters
from vballoon.virtio_pci.state import FunctionValue, pack, require, unpack
from vballoon.virtio_pci.structures import DeviceConfig, Structures
from vballoon.virtqueue import Engine, RingAddresses, RingState, Virtqueue, make_virtqueue
from vfio_user import ConfigSpace, DmaRegion, IoEvent, PciDevice, Region, RequestError
from virtio_formats.pci import BarFlags
from virtio_formats.vfio_user import PciIrq
from virtio_formats.virtio import features as f
from virtio_formats.virtio import split
from virtio_formats.virtio.pci import IsrStatus
from virtio_formats.virtio.status import DeviceStatus

__all__ = ("DEFAULT_RING_FEATURES", "VirtioPciFunction")

log = logging.getLogger(__name__)

DEFAULT_RING_FEATURES = f.mask(
    f.VIRTIO_F_VERSION_1,
    f.VIRTIO_F_INDIRECT_DESC,
    f.VIRTIO_F_EVENT_IDX,
    f.VIRTIO_F_RING_RESET,
)
"""Ring and transport features offered unless the operator asks for others."""


class VirtioPciFunction(PciDevice):
    """The PCI function around *device*; implements :class:`~vballoon.virtio.Transport`.

    Without *msix* the function has INTx only: QEMU 11.1.3 aborts when a ``vfio-user-pci`` device
    that has MSI-X is unplugged.  *events* receives what happens to queues and clients.
    """

    migratable = True

    def __init__(
        self,
        device: VirtioDevice,
        *,
        ring_features: int = DEFAULT_RING_FEATURES,
        engine: Engine = "batch",
        msix: bool = True,
        events: TransportEvents | None = None,
    ) -> None:
        self.device = device
        self._engine = engine
        vectors = layout.MsixLayout(device.num_queues + 1 if msix else 0)
        config, caps = _build_config(device, vectors)
        self.registers = CommonRegisters(
            offered=device.device_features | ring_features,
            queues=device.num_queues,
            size_max=device.queue_size_max,
            vectors=vectors.vectors,
            listener=self,
        )
        self.msix = MsixBar(vectors)
        self.rings = RingSet(device, self, events=events)
        self.device_config = DeviceConfig(device)
        self._kicked: dict[int, None] = {}
        self._more: dict[int, None] = {}  # had more than one turn's work
        self._busy = self._scheduled = self._reset_due = False
        self._stands_still = self._change_due = False
        # ERR is never signalled; without it QEMU warns that error recovery cannot be enabled.
        irqs: dict[int, int] = {PciIrq.INTX: 1, PciIrq.MSIX: vectors.vectors, PciIrq.ERR: 1}
        super().__init__(config, self._regions(), irqs)
        self.client_memory = ClientMemory(self.dma)
        self.irqs.add_one = guard.signal
        self.msix.irqs = self.irqs
        self.interrupts = Interrupts(config, self.irqs, self.intx, caps.msix)
        self._structures = Structures(
            self.registers, self.interrupts, self.device_config, self._kick
        )
        self._hooks = ConfigHooks(config, caps, self.regions, self._reset_function)

    def close(self) -> None:
        """Close the function's own descriptors; it cannot be served any more."""
        for event in self._bells:
            os.close(event.fd)
        self._bells.clear()

    def _regions(self) -> dict[int, Region]:
        self._bells = [
            IoEvent(
                os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC),
                layout.NOTIFY_PAGE + index * layout.NOTIFY_MULTIPLIER,
                2,
                partial(self._kick, index),
            )
            for index in range(self.device.num_queues)
        ]
        regions: dict[int, Region] = {
            layout.STRUCTURES_BAR: Region(
                layout.STRUCTURES_SIZE,
                read=lambda offset, count: self._structures.read(offset, count),
                write=lambda offset, data: self._structures.write(offset, data),
                bar=BarFlags.MEMORY_64,
                io_events=self._bells,
            ),
        }
        if self.msix.layout.vectors:
            size = self.msix.layout.bar_size
            regions[layout.MSIX_BAR] = Region(size, read=self.msix.read, write=self.msix.write)
        return regions

    # -- Transport --------------------------------------------------------------------------------

    @property
    def memory(self) -> GuestMemory:
        """Guest memory as it is now."""
        return self.client_memory.table

    @property
    def features(self) -> int:
        """The negotiated 64-bit feature word."""
        return self.registers.features

    @property
    def queues(self) -> Mapping[int, DeviceQueue]:
        """The rings that the driver has set up and that are started and enabled, by index."""
        return self.rings.running

    def config_changed(self) -> None:
        """Send the guest a configuration change notification."""
        if self._stands_still:
            self._change_due = True
        elif self.registers.running:
            self.interrupts.config_change(self.registers.config_vector)

    # -- what the driver does outside of the registers --------------------------------------------

    def _kick(self, index: int) -> None:
        self._kicked[index] = None
        self._schedule()

    def generation(self) -> int:
        """config_generation."""
        return self.device_config.generation()

    def refusal(self) -> str | None:
        """Return why no driver can be served now, or None."""
        if not self.client_memory.unmapped:
            return None
        return (
            "the client has unmapped all guest memory: an IOMMU of the guest translates this "
            "device's addresses, and a balloon needs guest-physical ones; boot the guest with "
            "iommu=pt, or attach the device over vhost-user"
        )

    def _reset_function(self) -> None:
        if self._busy:
            self._reset_due = True
        else:
            self.full_reset()

    # -- what the driver asks for through the registers -------------------------------------------

    def device_reset(self) -> None:
        """0 was written to device_status."""
        self._reset_due = True
        if not self._busy:
            self._reset_now()

    def driver_ok(self) -> None:
        """Start the queues that the driver has enabled."""
        self._schedule()

    def queue_enabled(self, index: int) -> None:
        """Start a queue, perhaps again after it was reset."""
        if self.registers.running:
            self._schedule()

    def queue_reset(self, index: int) -> None:
        """Reset a queue in deferred work, which clears ``resetting`` when it is done."""
        self._schedule()

    # -- deferred work ----------------------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.defer(self._work)

    def _work(self) -> None:
        """Do what is due: resets, memory, starting queues, serving them."""
        self._scheduled = False
        if self._busy:
            return
        self._busy = True
        try:
            self._settle()
            self._serve()
        finally:
            self._busy = False
        if self._reset_due:
            self._reset_now()
        if self._kicked or self._more or any(q.resetting for q in self.registers.queues):
            self._schedule()

    def _settle(self) -> None:
        """Bring queues and memory to where the registers and the client want them."""
        for index, queue in enumerate(self.registers.queues):
            if queue.resetting:
                self._reset_queue(index, queue)
        if self.client_memory.stale:
            self._change_memory()
        self._start()

    def _start(self) -> None:
        """Run the queues that the driver has enabled, while there is a client."""
        if self._stands_still or self.device.transport is None:
            return
        enabled = [i for i, q in enumerate(self.registers.queues) if q.enable]
        due = self.rings.settle(enabled if self.registers.running else ())
        self._kicked.update(dict.fromkeys(due))

    def _serve(self) -> None:
        """Serve each queue a bounded amount: those that were kicked before those with a rest."""
        due = self._kicked | self._more
        self._kicked, self._more = {}, {}
        for index in due:
            if self._reset_due:
                return
            if index in self.rings.running and self._serve_one(index):
                self._more[index] = None

    def _serve_one(self, index: int) -> bool:
        registers = self.registers.queues[index]
        if self.client_memory.check_shared((registers.desc, registers.driver)):
            return self.rings.process(index)
        self._change_memory()
        self._start()
        return True

    def _park(self, *, quiet: bool = False) -> None:
        """Stop the device, which gives back what it holds, and park every queue.

        *quiet*: what would take a message to the client is not given back.
        """
        self.client_memory.remote.quiet = quiet
        try:
            self.rings.park()
        finally:
            self.client_memory.remote.quiet = False

    def _reset_queue(self, index: int, queue: QueueRegisters) -> None:
        """*Virtqueue Reset*: the other queues continue where they are."""
        self.rings.end(index)
        self._kicked.pop(index, None)
        self._more.pop(index, None)
        queue.reset()

    def _reset_now(self) -> None:
        """*Device Reset*.  No message may wait for a client that waits for us."""
        self._reset_due = False
        self._give_up_unmapped()
        self._park(quiet=True)
        self._kicked.clear()
        self._more.clear()
        self.rings.reset()
        self.registers.reset()
        self.interrupts.reset()
        self.device.reset()

    def _give_up_unmapped(self) -> None:
        """Before a reset: give nothing back to rings that only messages reach."""
        for index, queue in self.rings.running.items():
            try:
                self.memory.window(self.registers.queues[index].device, 4)
            except MemoryFault:
                queue.broken = queue.broken or QueueError("device-reset")

    # -- what the ring set asks for ---------------------------------------------------------------

    def build_ring(self, index: int, record: RingRecord) -> Virtqueue:
        """See :class:`~vballoon.virtio.RingOwner`."""
        registers = self.registers.queues[index]
        position = record.position
        if position is None and index in self.rings.ran:
            position = self._interrupted_at(registers)
        return make_virtqueue(
            self.memory,
            registers.size,
            RingAddresses(registers.desc, registers.driver, registers.device),
            self.features,
            position,
            engine=self._engine,
            dirty_ring=registers.device,
        )

    def _interrupted_at(self, registers: QueueRegisters) -> RingState:
        """Return where a ring stopped when the process that served it ended.

        Every buffer that is not on the used ring of a split ring is served again.
        """
        if f.has(self.features, f.VIRTIO_F_RING_PACKED):
            raise ProtocolError("ring-position", "a packed ring without an in-flight record")
        raw = self.memory.read(registers.device + split.USED_IDX_OFFSET, 2)
        used = int.from_bytes(raw, "little")
        return RingState(avail=used, used=used)

    def device_starts(self) -> None:
        """See :class:`~vballoon.virtio.RingOwner`."""

    def notify(self, index: int) -> None:
        """See :class:`~vballoon.virtio.RingOwner`."""
        self.interrupts.queue(self.registers.queues[index].vector)

    def ring_broken(self, index: int, error: QueueError) -> None:
        """See :class:`~vballoon.virtio.RingOwner`."""
        self.registers.status |= DeviceStatus.NEEDS_RESET
        self.config_changed()

    def queue_statuses(self) -> list[QueueStatus]:
        """Return the status of every queue."""
        return [
            self.rings.status(index, size=q.size * q.enable, started=bool(q.enable))
            for index, q in enumerate(self.registers.queues)
        ]

    # -- the client -------------------------------------------------------------------------------

    def attached(self) -> None:
        """Attach the device to its client."""
        self.device.attach(self)
        self.rings.events.frontend_connected()

    def detached(self) -> None:
        """Park the queues.  Registers stay; queues continue once the next client has memory."""
        self._park(quiet=True)
        self._kicked.clear()
        self._more.clear()
        self.client_memory.forget_files()
        self.device.detach()
        self.rings.events.frontend_disconnected(self.client_error or "")

    def reset(self) -> None:
        """DEVICE_RESET."""
        self._hooks.restore()
        self._scheduled = False  # a reset drops deferred work
        self.msix.reset()
        self._reset_now()
        self._schedule()

    def dma_mapped(self, region: DmaRegion) -> None:
        """Add guest memory; the table follows in deferred work."""
        self.client_memory.add(region)
        self._schedule()

    def dma_unmapped(self, region: DmaRegion) -> None:
        """Remove guest memory; nothing of it is in use when this returns."""
        gone = self.client_memory.remove(region)
        if self.rings.running and gone.view is not None and not self._busy:
            self._change_memory(quiet=True)
        self._schedule()
        gone.close()

    def dma_logging(self, active: bool) -> None:
        """Start or stop logging the pages that the device writes."""
        self.memory.dirty_log = self.dma.log if active else None

    def _change_memory(self, *, quiet: bool = False) -> None:
        """Follow the client's memory map; queues continue where they stopped.

        *quiet*: the client waits for us, so nothing can be asked of it.
        """
        self._park(quiet=quiet)
        self.client_memory.refresh(self.dma.log if self.dma.log.active else None)
        if self.device.transport is not None:
            self.device.memory_changed()

    # -- migration --------------------------------------------------------------------------------

    def set_running(self, running: bool) -> None:
        """Stand still, with every buffer given back, or continue where the queues stopped."""
        if not running:
            self._park()
        self._stands_still = not running
        if running:
            self._schedule()
            if self._change_due:
                self._change_due = False
                self.config_changed()

    def state(self) -> FunctionValue:
        """Return what a driver has set and where the rings stopped, without the device's own."""
        return FunctionValue(
            base=self.base_state(),
            msix_table=self.msix.table,
            kept=tuple(sorted(self.msix.kept)),
            registers=self.registers.state(),
            rings=self.rings.state(),
            ran=tuple(sorted(self.rings.ran)),
            generation=self.generation(),
            isr=int(self.interrupts.isr),
            change_due=self._change_due,
        )

    def restore(self, value: FunctionValue, device: bytes | None = None) -> None:
        """Continue from *value*, and let the device load *device*, its own state, if it is given.

        Raise :class:`~vfio_user.RequestError` EINVAL, with nothing changed, for a state that is
        not one of this function.
        """
        self._check(value)
        try:
            if device is not None:
                self.device.load(device)
        except PeerError as error:
            raise RequestError(errno.EINVAL, f"device state: {error}") from None
        self.restore_base(value.base)
        self.msix.restore(value.msix_table, set(value.kept))
        self.registers.restore(value.registers)
        self.interrupts.restore(IsrStatus(value.isr))
        for irq in value.base.irqs:
            if irq.pending:  # deliver it now if the client has assigned an eventfd already
                self.irqs.trigger(irq.index, irq.vector)
        self.rings.restore(value.rings, value.ran)
        self._change_due = value.change_due
        self._hooks.restore()
        self.device_config.restore(value.generation)
        self._schedule()

    def _check(self, value: FunctionValue) -> None:
        self.check_base(value.base)
        self.registers.check(value.registers)
        require(len(value.msix_table) == len(self.msix.table), "another MSI-X table")
        require(all(v < self.msix.layout.vectors for v in value.kept), f"vectors {value.kept}")
        require(len(value.rings) == len(self.rings), f"{len(value.rings)} rings")
        require(set(value.ran) <= set(range(len(self.rings))), f"rings {value.ran}")
        packed = f.has(value.registers.driver_features, f.VIRTIO_F_RING_PACKED)
        try:
            for record, queue in zip(value.rings, value.registers.queues, strict=True):
                check_record(record, size=queue.size, packed=packed)
        except ProtocolError as error:
            raise RequestError(errno.EINVAL, f"device state: {error}") from None

    def save_state(self) -> bytes:
        """Return the function's and the device's state for migration."""
        return pack(self.state(), self.device.save())

    def load_state(self, data: bytes) -> None:
        """Take a migrated state over; raise :class:`~vfio_user.RequestError` EINVAL."""
        value, device = unpack(data)
        self.restore(value, device)


def _build_config(
    device: VirtioDevice, vectors: layout.MsixLayout
) -> tuple[ConfigSpace, layout.Capabilities]:
    return layout.build_config(
        device_id=device.device_id,
        class_code=device.pci_class,
        queues=device.num_queues,
        config_size=len(device.read_config()),
        msix=vectors,
    )
