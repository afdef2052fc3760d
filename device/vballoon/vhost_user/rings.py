# SPDX-License-Identifier: Apache-2.0
"""The vrings of one front-end: what it wants of each, and the event descriptors.

Messages change what the front-end wants (:mod:`~vballoon.vhost_user.handlers`);
:meth:`FrontendRings.settle` then starts and stops rings accordingly.

When is the device *reset*?  QEMU sends the same messages whether it pauses a guest or the guest
reboots: it disables and stops the rings.  The difference shows when they start again: the rings of
a driver that has just been loaded are at their beginning, those of a resumed guest are not.  So
the device is reset when it starts after a standstill and every ring is at its beginning (and by
RESET_DEVICE, which asks for it).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from vballoon.vhost_user.inflight import InflightArea
from vballoon.vhost_user.vring import Vring
from vballoon.virtio import DeviceQueue, RingRecord, RingSet, TransportEvents, VirtioDevice
from virtio_formats.vhost_user import VhostFeature
from virtio_formats.virtio import features as f
from virtio_formats.virtio.status import DeviceStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vballoon.errors import QueueError
    from vballoon.memory import GuestMemory
    from vballoon.vhost_user.dirty import FrontendLog
    from vballoon.vhost_user.io import Handle, Io
    from vballoon.vhost_user.memtable import MemoryTable
    from vballoon.vhost_user.slots import Slots
    from vballoon.vhost_user.state import VringState
    from vballoon.virtqueue import Engine, Virtqueue

__all__ = ("TRANSPORT_FEATURES", "FrontendRings")

# An int, not a flag: inverting a flag keeps only the bits that its class knows.
TRANSPORT_FEATURES = int(VhostFeature.LOG_ALL | VhostFeature.PROTOCOL_FEATURES)

POLL_SECONDS = 0.005
"""How often a ring is served for which the front-end gave no kick descriptor."""


class FrontendRings:
    """The vrings of *device*, in the memory of *table*; a :class:`~vballoon.virtio.RingOwner`.

    *own_record*: without an in-flight area of the front-end's, use one of our own.  *starting* is
    called before the device starts, *started* after that.
    """

    def __init__(
        self,
        device: VirtioDevice,
        io: Io,
        table: MemoryTable,
        log: FrontendLog,
        *,
        engine: Engine,
        events: TransportEvents | None,
        own_record: bool,
        starting: Callable[[], None],
        started: Callable[[], None],
    ) -> None:
        self._device, self._io, self._table, self._log = device, io, table, log
        self._engine, self._own_record = engine, own_record
        self._starting, self._started = starting, started
        self.acked = 0
        """The acknowledged feature word, the bits of vhost-user itself included."""
        self.status = DeviceStatus(0)
        self.features_ok = True
        """Whether the last SET_FEATURES was accepted."""
        self.owned = False
        """Whether SET_OWNER was received."""
        self.area: InflightArea | None = None
        self.own_area = False
        """Whether :attr:`area` is our own and not the front-end's."""
        self.vrings = [Vring(index) for index in range(device.num_queues)]
        self.set = RingSet(device, self, events=events)
        self.standstill = True
        """Whether no ring has run since the device was last reset or all rings were stopped."""
        self.held = False
        """Whether no ring is served, whatever the messages say."""
        self._poll: Handle | None = None

    @property
    def memory(self) -> GuestMemory:
        """Guest memory as it is now."""
        return self._table.memory

    @property
    def features(self) -> int:
        """The negotiated virtio feature word (without the bits of vhost-user itself)."""
        return self.acked & ~TRANSPORT_FEATURES

    @property
    def packed(self) -> bool:
        """Whether packed rings were negotiated."""
        return f.has(self.acked, f.VIRTIO_F_RING_PACKED)

    @property
    def suspended(self) -> bool:
        """Whether all rings are stopped ("Suspended device state")."""
        return not any(v.started for v in self.vrings)

    @property
    def ready(self) -> bool:
        """Whether the driver may be served, as far as the device status says.

        With STATUS negotiated that takes DRIVER_OK.  QEMU's generic device never gets further
        than FEATURES_OK, so for a front-end that does not even set DRIVER the rings decide.
        """
        return not self.status & DeviceStatus.DRIVER or bool(self.status & DeviceStatus.DRIVER_OK)

    # -- which rings run ----------------------------------------------------------------------

    def settle(self) -> None:
        """Run the rings that the messages so far want, and no other."""
        served = self.ready and self.memory.regions and not self.held
        wanted = [v.index for v in self.vrings if served and v.complete and v.enabled]
        due = self.set.settle(wanted)
        if due:
            self._started()
        for index in due:
            self._io.soon(partial(self.process, index))

    def device_starts(self) -> None:
        """See :class:`~vballoon.virtio.RingOwner`."""
        if self.standstill and all(v.is_initial for v in self.vrings if v.started):
            self._device.restart()
        self.standstill = False
        self._starting()

    def build_ring(self, index: int, record: RingRecord) -> Virtqueue:
        """See :class:`~vballoon.virtio.RingOwner`."""
        if self.area is None and self._own_record:
            self.set_area(InflightArea.create(len(self.vrings), self._device.queue_size_max))
            self.own_area = True
        return self.vrings[index].build(
            self.memory, self.features, self.area, record, engine=self._engine
        )

    def stop(self, vring: Vring) -> int:
        """GET_VRING_BASE: stop the ring; return the base that it stopped at."""
        record = self.set.end(vring.index)
        self.unwatch(vring)
        base = vring.stop(record, packed=self.packed)
        vring.set_fd("kick", None)
        if self.suspended:
            self.standstill = True
        self.settle()
        return base

    def reset(self) -> None:
        """RESET_DEVICE: reset rings and device; the connection stays."""
        self.set.reset()
        for vring in self.vrings:
            self.unwatch(vring)
            vring.set_fd("kick", None)
            vring.reset()
        if self.own_area:
            self.set_area(None)
        self.acked, self.status = 0, DeviceStatus(0)
        self._log.apply(self.acked)
        self.standstill = True
        self._device.reset()

    def set_area(self, area: InflightArea | None) -> None:
        """Use the in-flight *area* for rings that start from now on; it is taken over."""
        if self.area is not None:
            self.area.close()
        self.area, self.own_area = area, False

    def close(self) -> None:
        """Forget all rings and close their descriptors; the device is stopped already."""
        self.set.reset()
        if self._poll is not None:
            self._poll.cancel()
        for vring in self.vrings:
            self.unwatch(vring)
            vring.reset()
            vring.close()
        self.set_area(None)

    # -- state --------------------------------------------------------------------------------

    def vring_states(self, slots: Slots) -> tuple[VringState, ...]:
        """Return every ring as a value; the descriptors get *slots*."""
        return tuple(
            vring.state(slots, record, ran=vring.index in self.set.ran)
            for vring, record in zip(self.vrings, self.set.state(), strict=True)
        )

    def restore(
        self, states: Sequence[VringState], fds: Sequence[dict[str, int | None]], slots: Slots
    ) -> None:
        """Continue from *states*, which have been checked; *fds* are taken over."""
        ran = [index for index, state in enumerate(states) if state.ran]
        self.set.restore([state.record for state in states], ran)
        for vring, state, events in zip(self.vrings, states, fds, strict=True):
            vring.restore(state, events, slots)
            if vring.started and state.record.broken is None:
                self.watch(vring)

    # -- events of rings ----------------------------------------------------------------------

    def watch(self, vring: Vring) -> None:
        """Wait for kicks, or poll the ring; raise :class:`OSError`."""
        if vring.kick is not None:
            self._io.watch(vring.kick, partial(self.process, vring.index))
        elif self._poll is None:
            self._poll = self._io.every(POLL_SECONDS, self._poll_rings)

    def unwatch(self, vring: Vring) -> None:
        """Stop waiting for kicks."""
        if vring.kick is not None:
            self._io.unwatch(vring.kick)

    def _poll_rings(self) -> None:
        polled = [v.index for v in self.vrings if v.started and v.kick is None]
        for index in polled:
            self.process(index)
        if not polled and self._poll is not None:
            self._poll.cancel()
            self._poll = None

    def process(self, index: int) -> None:
        """Serve a bounded amount of ring *index*, and again later if more is left."""
        queue, vring = self.set.running.get(index), self.vrings[index]
        if queue is None or vring.busy:
            return
        if self.set.process(index):
            vring.busy = True
            self._io.soon(partial(self._again, queue))
        self._log.announce()

    def _again(self, queue: DeviceQueue) -> None:
        self.vrings[queue.index].busy = False
        if self.set.running.get(queue.index) is queue:
            self.process(queue.index)

    def notify(self, index: int) -> None:
        """See :class:`~vballoon.virtio.RingOwner`."""
        call = self.vrings[index].call
        if call is not None:
            self._io.signal(call)

    def ring_broken(self, index: int, error: QueueError) -> None:
        """See :class:`~vballoon.virtio.RingOwner`."""
        vring = self.vrings[index]
        self.unwatch(vring)  # further kicks of the driver cost nothing then
        if vring.err is not None:
            self._io.signal(vring.err)
