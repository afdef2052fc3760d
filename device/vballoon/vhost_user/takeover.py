# SPDX-License-Identifier: Apache-2.0
"""Check and open a saved state before anything of it is applied.

A state is treated like untrusted input: :func:`check` checks the numbers, and :class:`Staged` opens
the files that the descriptors refer to.  The back-end applies the state only if both succeed.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from vballoon.errors import ProtocolError
from vballoon.vhost_user.config import Channel, open_channel
from vballoon.vhost_user.dirty import SharedLog
from vballoon.vhost_user.inflight import InflightArea
from vballoon.vhost_user.memtable import MAX_MEM_SLOTS, MemoryTable
from vballoon.vhost_user.session import Fds
from vballoon.vhost_user.vring import MAX_QUEUE_SIZE, decode_base
from vballoon.virtio import check_record
from virtio_formats.vhost_user import ProtocolFeature, Request
from virtio_formats.virtio import features as f

if TYPE_CHECKING:
    from vballoon.vhost_user.io import Io
    from vballoon.vhost_user.slots import Descriptors
    from vballoon.vhost_user.state import BackendState, VringState
    from vballoon.virtio import VirtioDevice

__all__ = ("Staged", "check")

_STATUS_MAX = 0xFF


def check(
    state: BackendState, device: VirtioDevice, offered: int, protocol: ProtocolFeature
) -> None:
    """Check that *state* can be one of a back-end of *device* with these features *offered*.

    Raise :class:`~vballoon.errors.ProtocolError` ``state-value`` or ``ring-record``.
    """
    _require(not state.acked & ~offered, f"features {state.acked:#x}")
    surplus = state.protocol_features & ~int(protocol)
    _require(not surplus, f"protocol features {state.protocol_features:#x}")
    _require(state.status <= _STATUS_MAX, f"status {state.status:#x}")
    _require(len(state.vrings) == device.num_queues, f"{len(state.vrings)} rings")
    _require(len(state.regions) <= MAX_MEM_SLOTS, f"{len(state.regions)} regions")
    requests = [request for request, _ in state.counters]
    known = {0, *map(int, Request)}
    _require(len(set(requests)) == len(requests) and known >= set(requests), "counters")
    packed = f.has(state.acked, f.VIRTIO_F_RING_PACKED)
    for vring in state.vrings:
        _check_vring(vring, device.queue_size_max, packed)
    area = state.inflight
    if area is not None:
        _require(0 < area.num_queues <= device.num_queues, f"{area.num_queues} in-flight regions")
        _require(0 < area.queue_size <= MAX_QUEUE_SIZE, f"in-flight region of {area.queue_size}")
    _require(not state.own_area or area is not None, "own_area without an in-flight area")


def _check_vring(vring: VringState, size_max: int, packed: bool) -> None:
    num = vring.num
    _require(num <= min(size_max, MAX_QUEUE_SIZE), f"a ring of {num} descriptors")
    _require(packed or not num & (num - 1), f"a split ring of {num} descriptors")
    if vring.base is not None:
        decode_base(vring.base, packed=packed)
    _require(vring.started or not (vring.ran or vring.kick), "a kick of a stopped ring")
    if vring.ran or vring.record.position is not None:
        _require(vring.started and num > 0 and vring.addr is not None, "a ring that cannot run")
    check_record(vring.record, size=num, packed=packed)


class Staged:
    """The opened parts of a state: memory, in-flight area, log, channel, event descriptors."""

    def __init__(self, state: BackendState, given: Descriptors, io: Io) -> None:
        """Open everything; raise :class:`~vballoon.errors.PeerError`, with nothing left open."""
        self.table = MemoryTable()
        self.inflight: InflightArea | None = None
        self.log: SharedLog | None = None
        self.log_event: int | None = None
        self.channel: Channel | None = None
        self.events: list[dict[str, int | None]] = []
        with ExitStack() as undo:
            undo.callback(self.close)
            self._open(state, given, io)
            undo.pop_all()

    def _open(self, state: BackendState, given: Descriptors, io: Io) -> None:
        for vring in state.vrings:
            events: dict[str, int | None] = {}
            self.events.append(events)
            for name, slot in (("kick", vring.kick), ("call", vring.call), ("err", vring.err)):
                events[name] = given.take(slot) if slot else None
                _prepare(io, events[name], name)
        self.log_event = given.take(state.log_event) if state.log_event else None
        _prepare(io, self.log_event, "log")
        regions = Fds()
        try:
            for region in state.regions:
                regions.add([given.take(region.slot)])
            self.table.replace([region.describe() for region in state.regions], regions)
        finally:
            regions.close()
        if (area := state.inflight) is not None:
            self.inflight = InflightArea(
                given.take(area.slot), area.size, area.offset, area.num_queues, area.queue_size
            )
            self.inflight.region(0, packed=f.has(state.acked, f.VIRTIO_F_RING_PACKED))
        if state.log is not None:
            self.log = SharedLog(given.take(state.log.slot), state.log.size, state.log.offset)
        if state.channel:
            self.channel = open_channel(io, given.take(state.channel))

    def close(self) -> None:
        """Close everything that was opened."""
        events = [fd for ring in self.events for fd in ring.values() if fd is not None]
        fds = Fds(events if self.log_event is None else [*events, self.log_event])
        fds.close()
        self.table.clear()
        if self.inflight is not None:
            self.inflight.close()
        if self.log is not None:
            self.log.close()
        if self.channel is not None:
            self.channel[1].cancel()


def _prepare(io: Io, fd: int | None, name: str) -> None:
    if fd is not None:
        try:
            io.prepare(fd)
        except OSError as error:
            raise ProtocolError("fd-type", f"{name}: {error.strerror}") from None


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ProtocolError("state-value", otherwise)
