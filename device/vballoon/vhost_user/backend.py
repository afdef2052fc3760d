# SPDX-License-Identifier: Apache-2.0
"""One front-end's use of the device: the transport that a virtio device sees.

Messages change what the front-end wants (:mod:`~vballoon.vhost_user.handlers`); :meth:`settle`
then brings rings and device there: it takes away queues that are to stop, puts up those that are
complete, and tells the device.  The device is stopped before a queue goes away, so it gives back
what it holds while it still can.

When is the device *reset*?  QEMU says the same whether it pauses a guest or the guest reboots: it
disables and stops the rings.  The difference shows when they start again: a driver that begins
has rings at their beginning, a guest that goes on has not.  So the device is reset when it starts
after a standstill and every ring is at its beginning (and by RESET_DEVICE, which says so).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from fdsocket import close_fds
from vballoon.errors import PeerError, QueueError
from vballoon.vhost_user.handlers import Handlers
from vballoon.vhost_user.io import BackendEvents, ChannelIo, Handle, Io
from vballoon.vhost_user.memtable import MemoryTable
from vballoon.vhost_user.session import Session
from vballoon.vhost_user.transfer import StateTransfer
from vballoon.vhost_user.vring import Vring
from vballoon.virtio import DeviceQueue, VirtioDevice
from virtio_formats.vhost_user import ProtocolFeature as P
from virtio_formats.vhost_user import VhostFeature
from virtio_formats.virtio import features as f

if TYPE_CHECKING:
    from vballoon.memory import BitmapLog, DirtyLog, GuestMemory
    from vballoon.vhost_user.channel import BackendChannel
    from vballoon.vhost_user.inflight import InflightArea
    from vballoon.virtqueue import Engine, Virtqueue

__all__ = ("DEFAULT_RING_FEATURES", "PROTOCOL_FEATURES", "VhostUserBackend")

log = logging.getLogger(__name__)

PROTOCOL_FEATURES = (
    P.MQ
    | P.LOG_SHMFD
    | P.REPLY_ACK
    | P.BACKEND_REQ
    | P.CONFIG
    | P.BACKEND_SEND_FD
    | P.INFLIGHT_SHMFD
    | P.RESET_DEVICE
    | P.CONFIGURE_MEM_SLOTS
    | P.STATUS
    | P.DEVICE_STATE
    | P.GET_VRING_BASE_INFLIGHT
)
"""What is offered, each served in full.  QEMU acknowledges every bit that it is offered, used or
not, so nothing else may ever be in here."""

DEFAULT_RING_FEATURES = f.mask(f.VIRTIO_F_VERSION_1, f.VIRTIO_F_INDIRECT_DESC, f.VIRTIO_F_EVENT_IDX)
"""Ring features offered unless the operator asks for others.

QEMU shows the word to the guest as it is, so this is what the guest's driver will use.  Packed
rings and in-order use are implemented and can be asked for; measured on batches of 128 and 1024
buffers they cost the same as split rings, within the noise, so the older and better known format
is the default.  ACCESS_PLATFORM is not offered, because addresses are never translated here.
"""

# An int, not a flag: inverting a flag keeps only the bits that its class knows.
TRANSPORT_FEATURES = int(VhostFeature.LOG_ALL | VhostFeature.PROTOCOL_FEATURES)

ABSENT = frozenset({"memory-userspace", "memory-address", "ring-address"})
"""Rules that a ring breaks whose memory is not there.  Front-ends change a region by removing it
and adding it again, so a ring that has run already waits for that."""

POLL_SECONDS = 0.005
"""How often a ring is looked at for which the front-end gave no kick descriptor."""

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8
"""Device status bits (virtio: *Device Status Field*)."""


class VhostUserBackend:
    """The device as one front-end uses it; made for a connection, closed with it.

    Implements :class:`~vballoon.virtio.Transport`.
    """

    def __init__(
        self,
        device: VirtioDevice,
        io: Io,
        *,
        ring_features: int = DEFAULT_RING_FEATURES,
        protocol_features: P = PROTOCOL_FEATURES,
        events: BackendEvents | None = None,
        engine: Engine = "batch",
    ) -> None:
        self.device, self.io = device, io
        self._engine = engine
        self.events = events or BackendEvents()
        self.offered = device.device_features | ring_features | TRANSPORT_FEATURES
        self.acked = 0
        self.status = 0
        self.session = Session(Handlers(self).table(), protocol_features)
        self.table = MemoryTable()
        self.vrings = [Vring(index) for index in range(device.num_queues)]
        self.area: InflightArea | None = None
        self.transfer = StateTransfer(self)
        self.channel: BackendChannel | None = None
        self.channel_io: ChannelIo | None = None
        self.config_changes = 0
        self._log: BitmapLog | None = None
        self._log_fd: int | None = None
        self._logged = False
        self._queues: dict[int, DeviceQueue] = {}
        self._standstill = True  # no ring has run since the device was last at rest
        self._change_due = False
        self._poll: Handle | None = None
        device.attach(self)

    # -- Transport ----------------------------------------------------------------------------

    @property
    def memory(self) -> GuestMemory:
        """Guest memory as it is now."""
        return self.table.memory

    @property
    def features(self) -> int:
        """The negotiated virtio feature word (without the bits of vhost-user itself)."""
        return self.acked & ~TRANSPORT_FEATURES

    @property
    def queues(self) -> Mapping[int, DeviceQueue]:
        """The rings that are started and enabled, by index."""
        return self._queues

    @property
    def packed(self) -> bool:
        """Whether packed rings were negotiated."""
        return f.has(self.acked, f.VIRTIO_F_RING_PACKED)

    @property
    def suspended(self) -> bool:
        """Whether all rings are stopped ("Suspended device state")."""
        return not any(v.started for v in self.vrings)

    def config_changed(self) -> None:
        """Tell the front-end that the configuration has changed.

        A suspended device sends no messages ("Suspended device state"): the news waits until
        it runs again.
        """
        self._change_due = True
        self._tell_config()

    def _tell_config(self) -> None:
        if self._change_due and not self.suspended and self.channel and self.channel_io:
            self._change_due = False
            self.config_changes += 1
            self.channel.config_changed()
            self.channel_io.flush()

    # -- rings --------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the driver may be served, as far as the device status says.

        With STATUS negotiated that takes DRIVER_OK.  QEMU's generic device never gets further
        than FEATURES_OK, so a front-end that does not even say DRIVER is taken to leave the
        matter to the rings.
        """
        return not self.status & DRIVER or bool(self.status & DRIVER_OK)

    def settle(self) -> None:
        """Bring the rings and the device to where the messages so far want them."""
        target = {v.index: v for v in self.vrings if v.complete and v.enabled and self.ready}
        for vring in target.values():
            if vring.needs_binding and vring.broken is None and self.memory.regions:
                self._bind(vring)
        queues = {i: v.queue for i, v in target.items() if v.queue and not v.needs_binding}
        if queues.keys() == self._queues.keys() and all(
            self._queues[i] is queue for i, queue in queues.items()
        ):
            return
        new = [i for i, queue in queues.items() if self._queues.get(i) is not queue]
        if self._queues.keys() - queues.keys():
            self.pause()
        self._queues = queues
        if queues:
            self._start(new)

    def _bind(self, vring: Vring) -> None:
        try:
            vring.bind(
                self.memory,
                self.features,
                self.area,
                make_queue=self._make_queue,
                engine=self._engine,
            )
        except PeerError as error:
            if vring.queue is not None and error.rule in ABSENT:
                log.info("queue %d waits for its memory: %s", vring.index, error)
                return
            vring.broken = QueueError(error.rule, error.detail)
            log.error("queue %d cannot be started: %s", vring.index, error)
            self._report(vring, vring.broken)

    def _make_queue(self, index: int, ring: Virtqueue) -> DeviceQueue:
        return DeviceQueue(
            index, ring, notify=partial(self._notify, index), on_broken=self._on_broken
        )

    def _start(self, new: list[int]) -> None:
        """Tell the device, and look at the new rings: their kicks may have come long ago."""
        if self._standstill and all(v.is_initial for v in self.vrings if v.started):
            self.device.restart()
        self._standstill = False
        self.transfer.cancel("the rings were started")
        self.device.start()
        self._tell_config()
        for index in {*new, *self.device.overdue()}:
            self.io.soon(partial(self.process, index))

    def goes_on(self) -> None:
        """A state was loaded: the guest that starts the rings next is not at its beginning."""
        self._standstill = False

    def pause(self) -> None:
        """The device gives back what it holds; no queue is in use after that."""
        if self._queues:
            try:
                self.device.stop()
            finally:
                self._queues = {}

    def rebind(self) -> None:
        """What the rings rest on has changed (memory, addresses): put them up again."""
        self.pause()
        for vring in self.vrings:
            vring.unbind()

    def stop_vring(self, vring: Vring) -> int:
        """GET_VRING_BASE: stop the ring, and say where."""
        if vring.index in self._queues:
            self.pause()
        self.unwatch(vring)
        base = vring.stop(packed=self.packed)
        vring.set_fd("kick", None)
        if self.suspended:
            self._standstill = True
        self.settle()
        return base

    def reset(self) -> None:
        """RESET_DEVICE: rings and device as in the beginning; the connection stays."""
        self.pause()
        for vring in self.vrings:
            self.unwatch(vring)
            vring.set_fd("kick", None)
            vring.reset()
        self.status = self.acked = 0
        self.apply_log()
        self._standstill = True
        self.device.reset()

    # -- events of rings ----------------------------------------------------------------------

    def watch(self, vring: Vring) -> None:
        """Listen for kicks, or begin to poll; raises :class:`OSError`."""
        if vring.kick is not None:
            self.io.watch(vring.kick, partial(self.process, vring.index))
        elif self._poll is None:
            self._poll = self.io.every(POLL_SECONDS, self._poll_rings)

    def unwatch(self, vring: Vring) -> None:
        """Listen no more."""
        if vring.kick is not None:
            self.io.unwatch(vring.kick)

    def _poll_rings(self) -> None:
        polled = [v.index for v in self.vrings if v.started and v.kick is None]
        for index in polled:
            self.process(index)
        if not polled and self._poll is not None:
            self._poll.cancel()
            self._poll = None

    def process(self, index: int) -> None:
        """Serve a bounded amount of ring *index*; the loop comes back if more is left."""
        queue, vring = self._queues.get(index), self.vrings[index]
        if queue is None or vring.busy:
            return
        if self._guarded(queue):
            vring.busy = True
            self.io.soon(partial(self._again, queue))
        if self._logged and self._log_fd is not None:
            self.io.signal(self._log_fd)
        self._logged = False

    def _again(self, queue: DeviceQueue) -> None:
        vring = self.vrings[queue.index]
        vring.busy = False
        if self._queues.get(queue.index) is queue:
            self.process(queue.index)

    def _guarded(self, queue: DeviceQueue) -> bool:
        """Let the device serve the queue; a fault of ours stops that queue, not the loop."""
        try:
            return self.device.process(queue)
        except PeerError as error:
            queue.fail(QueueError(error.rule, error.detail))
        except Exception as error:
            log.debug("queue %d", queue.index, exc_info=True)
            queue.fail(QueueError("internal", f"{type(error).__name__}: {error}"))
        return False

    def _notify(self, index: int) -> None:
        call = self.vrings[index].call
        if call is not None:
            self.io.signal(call)

    def _on_broken(self, queue: DeviceQueue, error: QueueError) -> None:
        vring = self.vrings[queue.index]
        vring.broken = error
        self._report(vring, error)

    def _report(self, vring: Vring, error: QueueError) -> None:
        self.unwatch(vring)  # a driver that kicks on does not cost us anything
        self.events.queue_broken(vring.index, error.rule, error.detail)
        if vring.err is not None:
            self.io.signal(vring.err)

    # -- dirty log ----------------------------------------------------------------------------

    def set_log(self, area: BitmapLog) -> None:
        """SET_LOG_BASE: where writes are logged from now on."""
        self._log = area
        self.apply_log()

    def set_log_fd(self, fd: int) -> None:
        """SET_LOG_FD: whom to tell that the log has changed."""
        if self._log_fd is not None:
            close_fds([self._log_fd])
        self._log_fd = fd

    def apply_log(self) -> None:
        """Log writes if, and only if, LOG_ALL is negotiated and there is a log."""
        on = self._log is not None and self.acked & VhostFeature.LOG_ALL
        self.memory.dirty_log = _Noticing(self._log, self._notice) if on and self._log else None

    def _notice(self) -> None:
        self._logged = True

    # -- end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """The front-end has gone: the device is detached, every descriptor is closed."""
        self.session.close()
        self._quietly(self.pause)
        self.transfer.cancel("the connection has ended")
        self._quietly(self.device.detach)
        if self._poll is not None:
            self._poll.cancel()
        for vring in self.vrings:
            self.unwatch(vring)
            vring.reset()
            vring.close()
        if self.channel_io is not None:
            self.channel_io.cancel()
        self.set_area(None)
        if self._log_fd is not None:
            close_fds([self._log_fd])
            self._log_fd = None
        self.table.clear()

    def _quietly(self, step: Callable[[], None]) -> None:
        """A device that fails to say goodbye must not keep the next front-end waiting."""
        try:
            step()
        except Exception as error:
            log.debug("closing", exc_info=True)
            log.error("while letting the front-end go: %s: %s", type(error).__name__, error)

    def set_area(self, area: InflightArea | None) -> None:
        """The in-flight area for rings that start from now on."""
        if self.area is not None:
            self.area.close()
        self.area = area


class _Noticing:
    """A dirty log that tells of being written to."""

    def __init__(self, inner: DirtyLog, notice: Callable[[], None]) -> None:
        self._inner, self._notice = inner, notice

    def mark(self, addr: int, length: int) -> None:
        """See :class:`~vballoon.memory.DirtyLog`."""
        self._inner.mark(addr, length)
        self._notice()
