# SPDX-License-Identifier: Apache-2.0
"""Features, memory, dirty log and rings ("Front-end message types", vhost-user.rst, QEMU 11.1.3).

One method for each message, in the order of the document.  A method that raises
:class:`~vballoon.errors.ProtocolError` has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fdsocket import close_fds
from vballoon.errors import MemoryFault, ProtocolError
from vballoon.memory import VHOST_LOG_PAGE
from vballoon.vhost_user.dirty import SharedLog
from vballoon.vhost_user.inflight import InflightArea
from vballoon.vhost_user.memtable import MAX_MEM_SLOTS, MemoryTable
from vballoon.vhost_user.rings import TRANSPORT_FEATURES
from vballoon.vhost_user.session import Fds, Handler, Reply, u64
from vballoon.vhost_user.vring import MAX_QUEUE_SIZE, Vring, decode_base
from virtio_formats.vhost_user import (
    Request,
    VhostFeature,
    VhostUserInflight,
    VhostUserLog,
    VhostUserMemoryRegion,
    VhostUserMemRegMsg,
    VhostUserU64,
    VhostVringAddr,
    VhostVringState,
    VringFd,
)
from virtio_formats.virtio.status import DeviceStatus

if TYPE_CHECKING:
    from vballoon.vhost_user.dirty import FrontendLog
    from vballoon.vhost_user.io import Io
    from vballoon.vhost_user.rings import FrontendRings
    from vballoon.virtio import VirtioDevice

__all__ = ("Handlers",)


class Handlers:
    """The handlers of requests for *rings* and the memory in *table*.

    *offered* is the offered feature word.
    """

    def __init__(
        self,
        device: VirtioDevice,
        io: Io,
        rings: FrontendRings,
        table: MemoryTable,
        log: FrontendLog,
        offered: int,
    ) -> None:
        self._device, self._io = device, io
        self._rings, self._table, self._log = rings, table, log
        self._offered = offered

    def handlers(self) -> dict[Request, Handler]:
        """Return the handlers by request."""
        return {
            Request.GET_FEATURES: self.get_features,
            Request.SET_FEATURES: self.set_features,
            Request.SET_OWNER: self.set_owner,
            Request.RESET_OWNER: self.reset_owner,
            Request.RESET_DEVICE: self.reset_device,
            Request.SET_STATUS: self.set_status,
            Request.GET_STATUS: self.get_status,
            Request.GET_QUEUE_NUM: self.get_queue_num,
            Request.SET_MEM_TABLE: self.set_mem_table,
            Request.GET_MAX_MEM_SLOTS: self.get_max_mem_slots,
            Request.ADD_MEM_REG: self.add_mem_reg,
            Request.REM_MEM_REG: self.rem_mem_reg,
            Request.SET_LOG_BASE: self.set_log_base,
            Request.SET_LOG_FD: self.set_log_fd,
            Request.SET_VRING_NUM: self.set_vring_num,
            Request.SET_VRING_ADDR: self.set_vring_addr,
            Request.SET_VRING_BASE: self.set_vring_base,
            Request.GET_VRING_BASE: self.get_vring_base,
            Request.SET_VRING_ENABLE: self.set_vring_enable,
            Request.SET_VRING_KICK: self.set_vring_kick,
            Request.SET_VRING_CALL: self.set_vring_call,
            Request.SET_VRING_ERR: self.set_vring_err,
            Request.GET_INFLIGHT_FD: self.get_inflight_fd,
            Request.SET_INFLIGHT_FD: self.set_inflight_fd,
        }

    def _vring(self, index: int) -> Vring:
        vrings = self._rings.vrings
        if index >= len(vrings):
            raise ProtocolError("vring-index", f"{index} of {len(vrings)}")
        return vrings[index]

    # -- features -----------------------------------------------------------------------------

    def get_features(self, _: None, __: Fds) -> Reply:
        """Return the feature word offered."""
        return u64(self._offered)

    def set_features(self, message: VhostUserU64, _: Fds) -> None:
        """Acknowledge features; only LOG_ALL may change while a ring is started."""
        rings, value = self._rings, message.u64
        rings.features_ok = False
        if value & ~self._offered:
            raise ProtocolError("features-not-offered", f"{value & ~self._offered:#x}")
        if not rings.suspended and (value ^ rings.acked) & ~TRANSPORT_FEATURES:
            raise ProtocolError("features-while-running", f"{value:#x} after {rings.acked:#x}")
        rings.features_ok = True
        rings.acked = value
        self._log.apply(value)
        if not value & VhostFeature.PROTOCOL_FEATURES:
            # "the back-end must enable all rings immediately" ("Ring states")
            for vring in rings.vrings:
                vring.enabled = True
        rings.settle()

    def set_owner(self, _: None, __: Fds) -> None:
        """Record that the session has an owner; nothing depends on it."""
        self._rings.owned = True

    def reset_owner(self, _: None, __: Fds) -> None:
        """Disable all rings, as the deprecated message requires."""
        self._rings.owned = False
        for vring in self._rings.vrings:
            vring.enabled = False
        self._rings.settle()

    def reset_device(self, _: None, __: Fds) -> None:
        """Disable all rings and reset the device."""
        self._rings.reset()

    def set_status(self, message: VhostUserU64, _: Fds) -> None:
        """Set the device status; 0 stops every ring but does not reset the device."""
        rings, value = self._rings, message.u64
        if value > 0xFF:
            raise ProtocolError("status-value", f"{value:#x}")
        status = DeviceStatus(value)
        if not rings.features_ok:
            status &= ~DeviceStatus.FEATURES_OK
        if not status:
            for vring in rings.vrings:
                if vring.started:
                    rings.stop(vring)
        rings.status = status
        if not rings.ready:
            rings.set.pause()
        rings.settle()

    def get_status(self, _: None, __: Fds) -> Reply:
        """Return the device status."""
        return u64(self._rings.status)

    def get_queue_num(self, _: None, __: Fds) -> Reply:
        """Return the number of queues."""
        return u64(len(self._rings.vrings))

    # -- memory -------------------------------------------------------------------------------

    def set_mem_table(self, regions: list[VhostUserMemoryRegion], fds: Fds) -> None:
        """Replace the memory table."""
        self._change_memory(lambda table: table.replace(regions, fds))

    def get_max_mem_slots(self, _: None, __: Fds) -> Reply:
        """Return how many regions may be mapped."""
        return u64(MAX_MEM_SLOTS)

    def add_mem_reg(self, message: VhostUserMemRegMsg, fds: Fds) -> None:
        """Add a memory region."""
        self._change_memory(lambda table: table.add(message.region, fds))

    def rem_mem_reg(self, message: VhostUserMemRegMsg, _: Fds) -> None:
        """Remove a memory region, and close a descriptor that came with the message."""
        self._change_memory(lambda table: table.remove(message.region))

    def _change_memory(self, change: Callable[[MemoryTable], None]) -> None:
        """Park the rings, change the table, and run the rings again."""
        self._rings.set.park()
        try:
            change(self._table)
            self._log.apply(self._rings.acked)
            self._device.memory_changed()
        finally:
            self._rings.settle()

    # -- dirty log ----------------------------------------------------------------------------

    def set_log_base(self, message: VhostUserLog, fds: Fds) -> Reply:
        """Log writes to shared memory.  Reply with a u64 of 0, which every front-end accepts."""
        covered = message.mmap_size * 8 * VHOST_LOG_PAGE
        if covered < self._table.memory.end:
            raise ProtocolError("log-size", f"covers {covered:#x} of {self._table.memory.end:#x}")
        area = SharedLog(fds.take(), message.mmap_size, message.mmap_offset)
        self._log.set_area(area, self._rings.acked)
        return u64(0)

    def set_log_fd(self, _: None, fds: Fds) -> None:
        """Signal this descriptor after the log has changed."""
        fd = fds.take()
        self._prepare(fd, "log")
        self._log.set_fd(fd)

    # -- rings --------------------------------------------------------------------------------

    def set_vring_num(self, message: VhostVringState, _: Fds) -> None:
        """Set the queue size, in descriptors."""
        vring = self._stopped(message.index)
        most = min(self._device.queue_size_max, MAX_QUEUE_SIZE)
        if not 0 < message.num <= most:
            raise ProtocolError("vring-num", f"{message.num}, at most {most}")
        if not self._rings.packed and message.num & (message.num - 1):
            raise ProtocolError("vring-num", f"{message.num} is not a power of two")
        vring.num = message.num

    def set_vring_addr(self, message: VhostVringAddr, _: Fds) -> None:
        """Set the three areas; on a started ring only the logging may change."""
        vring, old = self._vring(message.index), self._vring(message.index).addr
        where = (message.descriptor, message.available, message.used)
        if vring.started and old is not None:
            if where != (old.descriptor, old.available, old.used):
                raise ProtocolError("vring-running", f"new addresses for ring {vring.index}")
            self._rings.set.park()
        elif self._table.memory.regions:
            self._check_addresses(where)
        vring.addr = message
        self._rings.settle()

    def _check_addresses(self, where: tuple[int, ...]) -> None:
        try:
            for addr in where:
                self._table.memory.from_userspace(addr)
        except MemoryFault as error:
            raise ProtocolError("vring-addr", error.detail) from None

    def set_vring_base(self, message: VhostVringState, _: Fds) -> None:
        """Set the position from which a stopped ring starts."""
        vring = self._stopped(message.index)
        decode_base(message.num, packed=self._rings.packed)
        vring.base = message.num

    def get_vring_base(self, message: VhostVringState, _: Fds) -> Reply:
        """Give back all buffers in flight, stop the ring, and return its base."""
        base = self._rings.stop(self._vring(message.index))
        return Reply(VhostVringState(index=message.index, num=base).build())

    def set_vring_enable(self, message: VhostVringState, _: Fds) -> None:
        """Enable or disable the ring."""
        vring = self._vring(message.index)
        if message.num > 1:
            raise ProtocolError("vring-enable", f"{message.num}")
        vring.enabled = bool(message.num)
        self._rings.settle()

    def _stopped(self, index: int) -> Vring:
        vring = self._vring(index)
        if vring.started:
            raise ProtocolError("vring-running", f"ring {index} is started")
        return vring

    # -- event descriptors --------------------------------------------------------------------

    def set_vring_kick(self, message: VhostUserU64, fds: Fds) -> None:
        """Start the ring with this kick descriptor, or without one and with polling."""
        vring, fd = self._event(message, fds)
        self._rings.unwatch(vring)
        vring.set_fd("kick", fd)
        vring.started = True
        try:
            self._rings.watch(vring)
        except OSError as error:
            vring.started = False
            vring.set_fd("kick", None)
            raise ProtocolError("fd-type", f"kick: {error.strerror}") from None
        self._rings.settle()

    def set_vring_call(self, message: VhostUserU64, fds: Fds) -> None:
        """Set the call descriptor, or none."""
        vring, fd = self._event(message, fds)
        self._prepare(fd, "call")
        vring.set_fd("call", fd)

    def set_vring_err(self, message: VhostUserU64, fds: Fds) -> None:
        """Set the error descriptor, or none; signal it at once if the ring is broken already."""
        vring, fd = self._event(message, fds)
        self._prepare(fd, "err")
        vring.set_fd("err", fd)
        if self._rings.set.record(vring.index).broken is not None and fd is not None:
            self._io.signal(fd)

    def _prepare(self, fd: int | None, name: str) -> None:
        if fd is None:
            return
        try:
            self._io.prepare(fd)
        except OSError as error:
            close_fds([fd])
            raise ProtocolError("fd-type", f"{name}: {error.strerror}") from None

    def _event(self, message: VhostUserU64, fds: Fds) -> tuple[Vring, int | None]:
        """Return the ring that the message names, and the descriptor (None: invalid-FD flag)."""
        vring = self._vring(message.u64 & VringFd.INDEX_MASK)
        if message.u64 & ~int(VringFd.INDEX_MASK | VringFd.INVALID_FD):
            raise ProtocolError("vring-fd-flags", f"{message.u64:#x}")
        none = bool(message.u64 & VringFd.INVALID_FD)
        if len(fds) == none:
            raise ProtocolError("fds-mismatch", f"{len(fds)} descriptors, flags {message.u64:#x}")
        return vring, None if none else fds.take()

    # -- in-flight area -----------------------------------------------------------------------

    def get_inflight_fd(self, message: VhostUserInflight, _: Fds) -> Reply:
        """Create an in-flight area."""
        self._check_inflight(message)
        area = InflightArea.create(message.num_queues, message.queue_size)
        self._rings.set_area(area)
        return Reply(area.describe().build(), [area.share()])

    def set_inflight_fd(self, message: VhostUserInflight, fds: Fds) -> None:
        """Use the in-flight area of an earlier back-end, or the one created just before."""
        self._check_inflight(message)
        area = InflightArea(
            fds.take(),
            message.mmap_size,
            message.mmap_offset,
            message.num_queues,
            message.queue_size,
        )
        try:
            area.region(0, packed=self._rings.packed)
        except ProtocolError:
            area.close()
            raise
        self._rings.set_area(area)

    def _check_inflight(self, message: VhostUserInflight) -> None:
        if not self._rings.suspended:
            raise ProtocolError("vring-running", "the in-flight area of started rings")
        if not 0 < message.num_queues <= len(self._rings.vrings):
            raise ProtocolError("inflight-queues", f"{message.num_queues}")
        if not 0 < message.queue_size <= MAX_QUEUE_SIZE:
            raise ProtocolError("inflight-queue-size", f"{message.queue_size}")
