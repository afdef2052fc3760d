# SPDX-License-Identifier: Apache-2.0
"""What each request does ("Front-end message types", vhost-user.rst, QEMU 11.1.3).

One method for each message, in the order of the document.  A method that raises
:class:`~vballoon.errors.ProtocolError` has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fdsocket import close_fds
from vballoon.errors import MemoryFault, ProtocolError
from vballoon.memory import VHOST_LOG_PAGE, BitmapLog
from vballoon.vhost_user.channel import BackendChannel
from vballoon.vhost_user.inflight import InflightArea
from vballoon.vhost_user.memtable import MAX_MEM_SLOTS, MemoryTable
from vballoon.vhost_user.session import Fds, Handler, Reply, u64
from vballoon.vhost_user.vring import Vring, decode_base
from virtio_formats.vhost_user import (
    MAX_CONFIG_SIZE,
    ConfigFlag,
    ProtocolFeature,
    Request,
    VhostFeature,
    VhostUserConfig,
    VhostUserInflight,
    VhostUserLog,
    VhostUserMemoryRegion,
    VhostUserMemRegMsg,
    VhostUserTransferDeviceState,
    VhostUserU64,
    VhostVringAddr,
    VhostVringState,
    VringFd,
)

if TYPE_CHECKING:
    from vballoon.vhost_user.backend import VhostUserBackend
    from vballoon.vhost_user.session import _Later

__all__ = ("Handlers",)

MAX_QUEUE_SIZE = 32768
"""Descriptors in a ring (virtio: *Virtqueues*)."""

FEATURES_OK = 8


class Handlers:
    """The request handlers of *backend*."""

    def __init__(self, backend: VhostUserBackend) -> None:
        self._b = backend
        self._features_ok = True

    def table(self) -> dict[Request, Handler]:
        """The handler of every request that is served."""
        return {
            request: getattr(self, request.name.lower())
            for request in Request
            if hasattr(self, request.name.lower())
        }

    def _vring(self, index: int) -> Vring:
        if index >= len(self._b.vrings):
            raise ProtocolError("vring-index", f"{index} of {len(self._b.vrings)}")
        return self._b.vrings[index]

    # -- features -----------------------------------------------------------------------------

    def get_features(self, _: None, __: Fds) -> Reply:
        """The feature word offered."""
        return u64(self._b.offered)

    def set_features(self, message: VhostUserU64, _: Fds) -> None:
        """The features acknowledged; only LOG_ALL may change while a ring is started."""
        b, value = self._b, message.u64
        self._features_ok = False
        if value & ~b.offered:
            raise ProtocolError("features-not-offered", f"{value & ~b.offered:#x}")
        of_transport = int(VhostFeature.LOG_ALL | VhostFeature.PROTOCOL_FEATURES)
        if not b.suspended and (value ^ b.acked) & ~of_transport:
            raise ProtocolError("features-while-running", f"{value:#x} after {b.acked:#x}")
        self._features_ok = True
        b.acked = value
        b.apply_log()
        if not value & VhostFeature.PROTOCOL_FEATURES:
            # "the back-end must enable all rings immediately" ("Ring states")
            for vring in b.vrings:
                vring.enabled = True
        b.settle()

    def get_protocol_features(self, _: None, __: Fds) -> Reply:
        """The protocol features offered."""
        return u64(self._b.session.offered)

    def set_protocol_features(self, message: VhostUserU64, _: Fds) -> None:
        """The protocol features acknowledged."""
        surplus = message.u64 & ~int(self._b.session.offered)
        if surplus:
            raise ProtocolError("protocol-features-not-offered", f"{surplus:#x}")
        needs = ProtocolFeature.INFLIGHT_SHMFD
        wanted = ProtocolFeature(message.u64)
        if ProtocolFeature.GET_VRING_BASE_INFLIGHT in wanted and needs not in wanted:
            raise ProtocolError("protocol-features", "GET_VRING_BASE_INFLIGHT alone")
        self._b.session.protocol_features = wanted

    def set_owner(self, _: None, __: Fds) -> None:
        """The session starts; there is nothing to do."""

    def reset_owner(self, _: None, __: Fds) -> None:
        """Deprecated: "use it to disable all rings"."""
        for vring in self._b.vrings:
            vring.enabled = False
        self._b.settle()

    def reset_device(self, _: None, __: Fds) -> None:
        """Disable all rings and reset the device."""
        self._b.reset()

    def set_status(self, message: VhostUserU64, _: Fds) -> None:
        """The device status; 0 stops every ring (see the backend for what it does not do)."""
        b, value = self._b, message.u64
        if value > 0xFF:
            raise ProtocolError("status-value", f"{value:#x}")
        if not self._features_ok:
            value &= ~FEATURES_OK
        if not value:
            for vring in b.vrings:
                if vring.started:
                    b.stop_vring(vring)
        b.status = value
        if not b.ready:
            b.pause()
        b.settle()

    def get_status(self, _: None, __: Fds) -> Reply:
        """The device status."""
        return u64(self._b.status)

    def get_queue_num(self, _: None, __: Fds) -> Reply:
        """How many queues there are."""
        return u64(len(self._b.vrings))

    # -- memory -------------------------------------------------------------------------------

    def set_mem_table(self, regions: list[VhostUserMemoryRegion], fds: Fds) -> None:
        """A whole new memory table."""
        self._change_memory(lambda table: table.replace(regions, fds))

    def get_max_mem_slots(self, _: None, __: Fds) -> Reply:
        """How many regions may be mapped."""
        return u64(MAX_MEM_SLOTS)

    def add_mem_reg(self, message: VhostUserMemRegMsg, fds: Fds) -> None:
        """One region more."""
        self._change_memory(lambda table: table.add(message.region, fds))

    def rem_mem_reg(self, message: VhostUserMemRegMsg, _: Fds) -> None:
        """One region less; a descriptor that came along is closed unused."""
        self._change_memory(lambda table: table.remove(message.region))

    def _change_memory(self, change: Callable[[MemoryTable], None]) -> None:
        """The rings are taken down, and put up again on whatever the table is then."""
        self._b.rebind()
        try:
            change(self._b.table)
            self._b.apply_log()
            self._b.device.memory_changed()
        finally:
            self._b.settle()

    # -- dirty log ----------------------------------------------------------------------------

    def set_log_base(self, message: VhostUserLog, fds: Fds) -> Reply:
        """The shared dirty log; answered by a u64 of 0, which every front-end understands."""
        covered = message.mmap_size * 8 * VHOST_LOG_PAGE
        if covered < self._b.memory.end:
            raise ProtocolError("log-size", f"covers {covered:#x} of {self._b.memory.end:#x}")
        self._b.set_log(BitmapLog.map(fds.take(), message.mmap_size, message.mmap_offset))
        return u64(0)

    def set_log_fd(self, _: None, fds: Fds) -> None:
        """Whom to signal when the log has changed."""
        fd = fds.take()
        self._prepare(fd, "log")
        self._b.set_log_fd(fd)

    # -- rings --------------------------------------------------------------------------------

    def set_vring_num(self, message: VhostVringState, _: Fds) -> None:
        """The queue size, in descriptors."""
        vring = self._stopped(message.index)
        most = min(self._b.device.queue_size_max, MAX_QUEUE_SIZE)
        if not 0 < message.num <= most:
            raise ProtocolError("vring-num", f"{message.num}, at most {most}")
        if not self._b.packed and message.num & (message.num - 1):
            raise ProtocolError("vring-num", f"{message.num} is not a power of two")
        vring.num = message.num

    def set_vring_addr(self, message: VhostVringAddr, _: Fds) -> None:
        """The three areas; on a started ring only the logging may change."""
        vring, old = self._vring(message.index), self._vring(message.index).addr
        where = (message.descriptor, message.available, message.used)
        if vring.started and old is not None:
            if where != (old.descriptor, old.available, old.used):
                raise ProtocolError("vring-running", f"new addresses for ring {vring.index}")
            self._b.rebind()
        elif self._b.memory.regions:
            self._check_addresses(where)
        vring.addr = message
        self._b.settle()

    def _check_addresses(self, where: tuple[int, ...]) -> None:
        try:
            for addr in where:
                self._b.memory.from_userspace(addr)
        except MemoryFault as error:
            raise ProtocolError("vring-addr", error.detail) from None

    def set_vring_base(self, message: VhostVringState, _: Fds) -> None:
        """Where a stopped ring starts."""
        vring = self._stopped(message.index)
        decode_base(message.num, packed=self._b.packed)
        vring.base = message.num

    def get_vring_base(self, message: VhostVringState, _: Fds) -> Reply:
        """Stop the ring; everything in flight has been given back by then."""
        base = self._b.stop_vring(self._vring(message.index))
        return Reply(VhostVringState(index=message.index, num=base).build())

    def set_vring_enable(self, message: VhostVringState, _: Fds) -> None:
        """Enable or disable the ring."""
        vring = self._vring(message.index)
        if message.num > 1:
            raise ProtocolError("vring-enable", f"{message.num}")
        vring.enabled = bool(message.num)
        self._b.settle()

    def _stopped(self, index: int) -> Vring:
        vring = self._vring(index)
        if vring.started:
            raise ProtocolError("vring-running", f"ring {index} is started")
        return vring

    # -- event descriptors --------------------------------------------------------------------

    def set_vring_kick(self, message: VhostUserU64, fds: Fds) -> None:
        """The kick descriptor, or none for polling; starts the ring."""
        vring, fd = self._event(message, fds)
        self._b.unwatch(vring)
        vring.set_fd("kick", fd)
        vring.started = True
        try:
            self._b.watch(vring)
        except OSError as error:
            vring.started = False
            vring.set_fd("kick", None)
            raise ProtocolError("fd-type", f"kick: {error.strerror}") from None
        self._b.settle()

    def set_vring_call(self, message: VhostUserU64, fds: Fds) -> None:
        """The call descriptor, or none."""
        vring, fd = self._event(message, fds)
        self._prepare(fd, "call")
        vring.set_fd("call", fd)

    def set_vring_err(self, message: VhostUserU64, fds: Fds) -> None:
        """The error descriptor, or none; told at once of a ring that is broken already."""
        vring, fd = self._event(message, fds)
        self._prepare(fd, "err")
        vring.set_fd("err", fd)
        if vring.broken is not None and fd is not None:
            self._b.io.signal(fd)

    def _prepare(self, fd: int | None, name: str) -> None:
        if fd is None:
            return
        try:
            self._b.io.prepare(fd)
        except OSError as error:
            close_fds([fd])
            raise ProtocolError("fd-type", f"{name}: {error.strerror}") from None

    def _event(self, message: VhostUserU64, fds: Fds) -> tuple[Vring, int | None]:
        """The ring meant, and its descriptor: exactly one, or none under the invalid-FD flag."""
        vring = self._vring(message.u64 & VringFd.INDEX_MASK)
        if message.u64 & ~int(VringFd.INDEX_MASK | VringFd.INVALID_FD):
            raise ProtocolError("vring-fd-flags", f"{message.u64:#x}")
        none = bool(message.u64 & VringFd.INVALID_FD)
        if len(fds) == none:
            raise ProtocolError("fds-mismatch", f"{len(fds)} descriptors, flags {message.u64:#x}")
        return vring, None if none else fds.take()

    # -- back-end channel, configuration ------------------------------------------------------

    def set_backend_req_fd(self, _: None, fds: Fds) -> None:
        """The socket for the back-end's own requests."""
        channel = BackendChannel()
        try:
            channel_io = self._b.io.open_channel(fds.take(), channel)
        except OSError as error:
            raise ProtocolError("fd-type", f"back-end channel: {error.strerror}") from None
        if self._b.channel_io is not None:
            self._b.channel_io.cancel()
        self._b.channel, self._b.channel_io = channel, channel_io

    def get_config(self, message: VhostUserConfig, _: Fds) -> Reply:
        """A part of the configuration space; beyond its end there are zeroes."""
        self._check_config(message)
        config = self._b.device.read_config().ljust(MAX_CONFIG_SIZE, b"\0")
        message.region = config[message.offset : message.offset + message.size]
        return Reply(message.build())

    def set_config(self, message: VhostUserConfig, _: Fds) -> None:
        """The driver wrote; read-only fields are the device's business, not an error.

        QEMU sends the whole block whenever the driver writes any of it, read-only fields with
        the values that it last read.  Refusing that would fail a driver that did nothing wrong.
        """
        self._check_config(message)
        if message.flags not in (ConfigFlag.WRITABLE, ConfigFlag.MIGRATION):
            raise ProtocolError("config-flags", f"{message.flags:#x}")
        room = max(0, len(self._b.device.read_config()) - message.offset)
        if message.region[:room]:
            self._b.device.write_config(message.offset, message.region[:room])

    def _check_config(self, message: VhostUserConfig) -> None:
        if message.size != len(message.region):
            raise ProtocolError("config-size", f"{message.size}, {len(message.region)} bytes sent")
        if not 0 < message.size <= MAX_CONFIG_SIZE - message.offset:
            raise ProtocolError("config-range", f"{message.offset}+{message.size}")

    # -- in-flight area, device state ---------------------------------------------------------

    def get_inflight_fd(self, message: VhostUserInflight, _: Fds) -> Reply:
        """A new in-flight area."""
        self._check_inflight(message)
        area = InflightArea.create(message.num_queues, message.queue_size)
        self._b.set_area(area)
        return Reply(area.describe().build(), [area.share()])

    def set_inflight_fd(self, message: VhostUserInflight, fds: Fds) -> None:
        """The in-flight area of an earlier life, or the one that was asked for."""
        self._check_inflight(message)
        area = InflightArea(
            fds.take(), message.mmap_size, message.mmap_offset, message.num_queues,
            message.queue_size,
        )  # fmt: skip
        try:
            area.region(0, packed=self._b.packed)
        except ProtocolError:
            area.close()
            raise
        self._b.set_area(area)

    def _check_inflight(self, message: VhostUserInflight) -> None:
        if not self._b.suspended:
            raise ProtocolError("vring-running", "the in-flight area of started rings")
        if not 0 < message.num_queues <= len(self._b.vrings):
            raise ProtocolError("inflight-queues", f"{message.num_queues}")
        if not 0 < message.queue_size <= MAX_QUEUE_SIZE:
            raise ProtocolError("inflight-queue-size", f"{message.queue_size}")

    def set_device_state_fd(self, message: VhostUserTransferDeviceState, fds: Fds) -> Reply:
        """Save or load the device's state."""
        return self._b.transfer.begin(message, fds)

    def check_device_state(self, _: None, __: Fds) -> Reply | _Later:
        """Whether that went well."""
        return self._b.transfer.check()
