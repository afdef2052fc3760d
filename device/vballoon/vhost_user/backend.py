# SPDX-License-Identifier: Apache-2.0
"""One front-end's use of the device: the parts of the transport, put together.

:class:`VhostUserBackend` is the transport that a virtio device sees.  The parts know each other
only where they must: messages go from the session to their handlers, which change the memory
table, the dirty log and the rings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vballoon.vhost_user.config import ConfigAccess
from vballoon.vhost_user.dirty import FrontendLog
from vballoon.vhost_user.handlers import Handlers
from vballoon.vhost_user.memtable import MemoryTable
from vballoon.vhost_user.rings import TRANSPORT_FEATURES, FrontendRings
from vballoon.vhost_user.session import Reply, Session
from vballoon.vhost_user.slots import Descriptors, Slots
from vballoon.vhost_user.state import AreaState, BackendState
from vballoon.vhost_user.takeover import Staged, check
from vballoon.vhost_user.transfer import StateTransfer
from vballoon.virtio import (
    DeviceQueue,
    TransportEvents,
    TransportStatus,
    VirtioDevice,
    feature_names,
    internal_fault,
    region_statuses,
)
from virtio_formats.vhost_user import ProtocolFeature as P
from virtio_formats.virtio import features as f
from virtio_formats.virtio.status import DeviceStatus

if TYPE_CHECKING:
    from vballoon.memory import GuestMemory
    from vballoon.vhost_user.io import Io
    from vballoon.vhost_user.vring import Vring
    from vballoon.virtqueue import Engine

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
"""Protocol features offered, each served in full.  QEMU acknowledges every bit that it
is offered, used or not, so nothing else may ever be in here."""

DEFAULT_RING_FEATURES = f.mask(f.VIRTIO_F_VERSION_1, f.VIRTIO_F_INDIRECT_DESC, f.VIRTIO_F_EVENT_IDX)
"""Ring features offered unless the operator asks for others.

QEMU shows the word to the guest as it is, so this is what the guest's driver will use.  Packed
rings and in-order use are implemented and can be asked for; measured on batches of 128 and 1024
buffers they cost the same as split rings, within the noise, so the older and better known format
is the default.  ACCESS_PLATFORM is not offered, because addresses are never translated here.
"""


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
        events: TransportEvents | None = None,
        engine: Engine = "batch",
        own_record: bool = False,
    ) -> None:
        """Attach *device*.

        *own_record*: keep an in-flight area of our own if the front-end gives none, so that
        another process can continue from :meth:`state`.
        """
        self.device, self._io = device, io
        self._slots = Slots()
        self.table = MemoryTable()
        self.config = ConfigAccess(device, io)
        self._log = FrontendLog(self.table, io)
        self.rings = FrontendRings(
            device,
            io,
            self.table,
            self._log,
            engine=engine,
            events=events,
            own_record=own_record,
            starting=lambda: self._transfer.cancel("the rings were started"),
            started=self._send_change,
        )
        self._transfer = StateTransfer(device, io, self.rings, self._finish)
        self._offered = device.device_features | ring_features | TRANSPORT_FEATURES
        handlers = Handlers(device, io, self.rings, self.table, self._log, self._offered).handlers()
        self.session = Session(
            handlers | self.config.handlers() | self._transfer.handlers(), protocol_features
        )
        device.attach(self)

    def _finish(self, reply: Reply) -> None:
        """Send an answer that became known after its request was handled."""
        if self.session.waiting:
            self.session.finish(reply)
            self._io.output()

    # -- Transport ----------------------------------------------------------------------------

    @property
    def memory(self) -> GuestMemory:
        """Guest memory as it is now."""
        return self.table.memory

    @property
    def features(self) -> int:
        """The negotiated virtio feature word (without the bits of vhost-user itself)."""
        return self.rings.features

    @property
    def queues(self) -> Mapping[int, DeviceQueue]:
        """The rings that are started and enabled, by index."""
        return self.rings.set.running

    @property
    def vrings(self) -> list[Vring]:
        """What the front-end has said about each ring."""
        return self.rings.vrings

    def config_changed(self) -> None:
        """Send the front-end a configuration change notification, once the device runs."""
        self.config.change_due = True
        self._send_change()

    def _send_change(self) -> None:
        self.config.send_change(suspended=self.rings.suspended)

    # -- state --------------------------------------------------------------------------------

    def state(self) -> tuple[BackendState, dict[int, int]]:
        """Return the connection as a value, and its descriptors by slot (they stay ours).

        A descriptor keeps its slot from one call to the next.
        """
        slots, rings = self._slots, self.rings
        slots.begin()
        area, log, channel = rings.area, self._log.area, self.config.channel
        state = BackendState(
            acked=rings.acked,
            protocol_features=int(self.session.protocol_features),
            status=int(rings.status),
            owned=rings.owned,
            features_ok=rings.features_ok,
            standstill=rings.standstill,
            change_due=self.config.change_due,
            transferred=self._transfer.succeeded,
            own_area=rings.own_area,
            config_changes=self.config.changes,
            regions=self.table.state(slots),
            inflight=area.state(slots) if area is not None else None,
            log=AreaState(slots.slot(log, log.fd), log.size, log.offset) if log else None,
            log_event=slots.slot(self._log.fd_key, self._log.fd),
            channel=slots.slot(channel[0], channel[1].fileno()) if channel is not None else 0,
            vrings=rings.vring_states(slots),
            counters=self.session.request_counters(),
        )
        return state, slots.end()

    def restore(self, state: BackendState, fds: Mapping[int, int]) -> None:
        """Continue the connection *state* of another process, whose descriptors are *fds*.

        The back-end must be fresh, and the device's own state restored before.  The descriptors
        are taken over, also on failure.  Raise :class:`~vballoon.errors.PeerError`, with nothing
        changed, for a state that is not one of this device.
        """
        given = Descriptors(fds)
        try:
            check(state, self.device, self._offered, self.session.offered)
            staged = Staged(state, given, self._io)
        finally:
            given.close()
        self._adopt(state, staged)
        self.device.memory_changed()
        self.rings.settle()

    def _adopt(self, state: BackendState, staged: Staged) -> None:
        rings, slots = self.rings, self._slots
        self.session.restore(P(state.protocol_features), state.counters)
        self.table.adopt(staged.table, state.regions, slots)
        rings.acked, rings.status = state.acked, DeviceStatus(state.status)
        rings.owned, rings.features_ok = state.owned, state.features_ok
        rings.standstill = state.standstill
        rings.set_area(staged.inflight)
        rings.own_area = state.own_area
        self._log.set_fd(staged.log_event)
        if staged.log is not None and state.log is not None:
            slots.keep(staged.log, state.log.slot)
            self._log.set_area(staged.log, state.acked)
        if staged.inflight is not None and state.inflight is not None:
            slots.keep(staged.inflight, state.inflight.slot)
        if staged.channel is not None:
            slots.keep(staged.channel[0], state.channel)
            self.config.set_channel(staged.channel)
        slots.keep(self._log.fd_key, state.log_event)
        self.config.change_due, self.config.changes = state.change_due, state.config_changes
        self._transfer.succeeded = state.transferred
        rings.restore(state.vrings, staged.events, slots)

    # -- status and end -----------------------------------------------------------------------

    def status(
        self, counters: Mapping[str, int], device_names: Mapping[int, str] | None = None
    ) -> TransportStatus:
        """Return what is negotiated and running.

        *counters* are published with it; *device_names* names the feature bits of the device.
        """
        acked = self.session.protocol_features
        return TransportStatus(
            connected=True,
            features=feature_names(self.features, device_names),
            protocol_features=[p.name or hex(p) for p in P if p in acked],
            queues=[
                self.rings.set.status(v.index, size=v.num, started=v.started, recovered=v.recovered)
                for v in self.vrings
            ],
            regions=region_statuses(self.memory),
            front_end_queues=sum(v.err is not None or v.call is not None for v in self.vrings),
            counters=dict(counters),
        )

    def close(self) -> None:
        """End the connection: detach the device and close every descriptor."""
        self.session.close()
        self._guarded(self.rings.set.pause)
        self._transfer.cancel("the connection has ended")
        self._guarded(self.device.detach)
        self.rings.close()
        self.config.close()
        self._log.close()
        self.table.clear()
        self._slots.clear()

    def _guarded(self, step: Callable[[], None]) -> None:
        """Do a *step* of closing; a device that fails must not keep the next front-end waiting."""
        try:
            step()
        except Exception as error:
            log.error("while the connection is closed: %s", internal_fault(error))
