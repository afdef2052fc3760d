# SPDX-License-Identifier: Apache-2.0
"""The class to derive a device from.

A device outlives its client: when a client disconnects its DMA regions are unmapped and its
eventfds are closed; registers, configuration space and migration state stay.  All calls come from
one thread.

    class Doorbell(PciDevice):
        def __init__(self) -> None:
            config = ConfigSpace(vendor_id=0x1AF4, device_id=0x10F0, interrupt_pin=1)
            bar = Region(4096, read=self.peek, write=self.poke)
            super().__init__(config, {PciRegion.BAR0: bar}, {PciIrq.INTX: 1})
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping

from vfio_user.config import ConfigSpace
from vfio_user.descriptors import Descriptors
from vfio_user.dma import DmaRegion, DmaTable
from vfio_user.errors import RequestError, UsageError
from vfio_user.faults import guarded, report_fault
from vfio_user.intx import IntxPin
from vfio_user.irqs import IrqTable
from vfio_user.migration import MigrationMachine
from vfio_user.regions import IoEvent, Region
from vfio_user.state import BaseState
from vfio_user.steps import Run, Spawn, Steps, awaited, finish, run_now
from virtio_formats.vfio_user import PCI_NUM_REGIONS, DeviceFlags, PciRegion

__all__ = ("PciDevice",)

_EMPTY = Region(0)
_FINISH_ROUNDS = 64
"""Rounds of deferred work before a device is stopped; a queue that is never empty must not
keep it from that."""


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
        if self.regions[PciRegion.ROM].size:
            config.add_rom(self.regions[PciRegion.ROM])
        self.client_error: str | None = None
        """Why the last client disconnected, for :meth:`detached`; None for an orderly end."""
        self._deferred: deque[Callable[[], None]] = deque()
        self._working = self._reset_due = False
        self.spawn: Spawn = run_now
        """Lets the coroutines of ``async def`` hooks run; set by the server."""
        self.changes = 0
        """How many changes of the whole device wait for a hook; no command is served meanwhile."""
        self._at_reset: list[Callable[[], None]] = []
        self._watch: Callable[[IoEvent, bool], None] | None = None
        self._wake: Callable[[], None] | None = None

    device_flags = DeviceFlags.PCI | DeviceFlags.RESET

    # -- for a device to override -----------------------------------------------------------------

    # ``reset``, ``dma_unmapped``, ``set_running`` and ``quiesce`` may be ``async def``: the command
    # is answered, and the next one is served, when they have returned.

    def reset(self) -> Awaitable[None] | None:
        """Reset the registers, as after power-on; configuration space has been reset already."""
        return None

    def quiesce(self) -> Awaitable[None] | None:
        """Finish what is under way, before DMA_MAP, DMA_UNMAP, a reset or a change of state.

        The default has nothing to wait for.  A device that has may override this with ``async
        def``: the command, and all that follow it, wait until it returns.  An exception refuses
        the command (:class:`~vfio_user.errors.RequestError` with its errno).  Work that was
        started elsewhere may continue when the command has been served.
        """
        return None

    def attached(self) -> None:
        """Prepare for a client, which has connected and negotiated."""

    def detached(self) -> None:
        """Stop using the client, which has disconnected; its memory is unmapped next."""

    def dma_mapped(self, region: DmaRegion) -> None:
        """Start to use a piece of client memory."""

    def dma_unmapped(self, region: DmaRegion) -> Awaitable[None] | None:
        """Stop using a piece of client memory before this returns.  It stays mapped until then."""
        return None

    def dma_logging(self, active: bool) -> None:
        """Start or stop recording which client memory the device writes.

        What goes through ``dma.write`` is logged there; a device that writes mapped memory
        itself must call ``dma.log.mark``.
        """

    def irq_state(self, index: int, start: int, count: int, masked: bool) -> None:
        """Take note that the client masked or unmasked vectors."""

    def save_running(self) -> bytes:
        """Return more of the device's state while it runs, for PRE_COPY; empty if none is ready.

        It precedes what :meth:`save_state` returns in the same stream.
        """
        return b""

    def load_piece(self, data: bytes, first: bool) -> bool:
        """Take a piece of a state as it arrives; *first* says that a new state begins.

        Return False, as the default does, to have all of it collected for :meth:`load_state`,
        which otherwise gets no bytes and checks that nothing is missing.
        """
        return False

    def save_state(self) -> bytes | Iterable[bytes]:
        """Return the device's state for migration; the device stands still.

        A large state can be an iterable of pieces, which are asked for as the client reads.
        """
        raise RequestError(errno.EINVAL, "the device does not migrate")

    def load_state(self, state: bytes) -> None:
        """Take a state over.  Raise :class:`~vfio_user.errors.RequestError` if it is malformed."""
        raise RequestError(errno.EINVAL, "the device does not migrate")

    def set_running(self, running: bool) -> Awaitable[None] | None:
        """Stand still (no DMA, no interrupts), or continue."""
        return None

    # -- for a device to use ----------------------------------------------------------------------

    def defer(self, work: Callable[[], None]) -> None:
        """Do *work* once the command being served has been answered.

        A reset drops it; while the device stands still for a migration it is held back.

        This is the place for DMA: a client may wait for the answer to a region access before it
        looks at the DMA messages that the access caused (QEMU 11.1 holds its global lock then).
        """
        self._deferred.append(work)
        self.wake()

    def add_region(self, index: int, region: Region) -> None:
        """Declare a BAR after the others, before the device is served."""
        if self.regions[index].size or not 0 <= index < 6:
            raise UsageError(f"region {index} cannot be added")
        self.config.add_bar(index, region)
        self.regions[index] = region

    def add_io_event(self, index: int, event: IoEvent) -> None:
        """Offer an ioeventfd in region *index*, also while a client is connected.

        A client learns of it when it asks for the region's descriptors the next time.
        """
        region = self.regions[index]
        if event.offset < 0 or event.offset + max(1, event.size) > region.size:
            raise UsageError(f"an ioeventfd at {event.offset:#x} outside its region")
        region.io_events.append(event)
        if self._watch is not None:
            self._watch(event, True)

    def remove_io_event(self, index: int, event: IoEvent) -> None:
        """Take an ioeventfd back; its descriptor can be closed then."""
        self.regions[index].io_events.remove(event)
        if self._watch is not None:
            self._watch(event, False)

    def at_reset(self, hook: Callable[[], None]) -> None:
        """Call *hook* at every reset, before :meth:`reset`."""
        self._at_reset.append(hook)

    def request_reset(self) -> None:
        """Reset the function (the guest asked for it), after deferred work that is under way.

        The device is quiesced first.  Commands that come later wait for its end.
        """
        if self._working or self.changes:
            self._reset_due = True
        else:
            self.change(self._quiet_reset(), "a reset")

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

    def wake(self) -> None:
        """Have the server do deferred work, and serve the commands that waited for its end."""
        if self._wake is not None:
            self._wake()

    # -- for sessions and servers -----------------------------------------------------------------

    def on_io_event(self, watch: Callable[[IoEvent, bool], None] | None) -> None:
        """Call *watch(event, added)* for every ioeventfd that comes or goes later."""
        self._watch = watch

    def on_deferred(self, wake: Callable[[], None] | None) -> None:
        """Call *wake* whenever :meth:`run_deferred` should be called soon."""
        self._wake = wake

    @property
    def has_work(self) -> bool:
        """Return whether :meth:`run_deferred` would do anything."""
        return bool(self._deferred) and self.migration.is_running

    def run_deferred(self) -> None:
        """Do what was deferred until now; what that defers in turn waits for the next call.

        Nothing while the device stands still for a migration: its memory must not change.
        """
        if self._working or self.changes:
            return
        if self._reset_due:  # asked for during a change that has ended
            self._reset_due = False
            self.change(self._quiet_reset(), "a reset")
        if self.changes or not self.migration.is_running:
            return
        for _ in range(len(self._deferred)):
            work = self._deferred.popleft()
            self._working = True
            guarded("deferred work", work)
            self._working = False
            if self._reset_due:
                self._reset_due = False
                self.change(self._quiet_reset(), "a reset")
                return

    def finish_work(self) -> None:
        """Do deferred work until there is none, or for a bounded number of rounds.

        Before the device is stopped or its state is replaced.
        """
        for _ in range(_FINISH_ROUNDS):
            if not self.has_work:
                return
            self.run_deferred()

    def change(self, steps: Steps[None], what: str) -> None:
        """Run *steps*, which change the device as a whole and which no command waits for."""

        def done(result: None, error: BaseException | None) -> None:
            self.changes -= 1
            if isinstance(error, Exception):
                report_fault(what, error)
            self.wake()

        self.changes += 1
        Run(steps, self.spawn, done)

    def _quiet_reset(self) -> Steps[None]:
        yield from awaited(self.quiesce())
        yield from self.reset_steps()

    def full_reset(self) -> None:
        """Reset the function at once; no hook may wait."""
        finish(self.reset_steps())

    def reset_steps(self) -> Steps[None]:
        """Serve DEVICE_RESET: deferred work is dropped, everything is as after power-on."""
        self._deferred.clear()
        self.config.reset()
        self.irqs.clear_pending()
        self.intx.reset()
        self.stop_logging()
        yield from self.migration.resetting()
        for hook in self._at_reset:
            hook()
        yield from awaited(self.reset())

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
        # A device that fails here must not keep the next client out.
        guarded("detached", self.detached)
        self.change(self.dma.clearing(), "unmapping")
        guarded("stopping the log", self.stop_logging)
        self.irqs.close()
