# SPDX-License-Identifier: Apache-2.0
"""Serve each command: a table from command to function.

A handler gets the link, the device and the message, and returns the reply's payload and
descriptors.  It raises :class:`~vfio_user.errors.RequestError` (or lets a
:class:`~virtio_formats.wire.WireError` pass) to refuse, and takes a descriptor over by removing it
from the message.  Section names are those of the vfio-user specification of QEMU 11.1.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from vfio_user import features
from vfio_user.errors import FatalError, RequestError
from virtio_formats.pci import BarFlags
from virtio_formats.vfio_user import (
    CLIENT_COMMANDS,
    PCI_NUM_IRQS,
    PCI_NUM_REGIONS,
    VERSION_MAJOR,
    VERSION_MINOR,
    Capabilities,
    Command,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    IoEventFd,
    IrqInfo,
    IrqSet,
    MigData,
    RegionAccess,
    RegionInfo,
    RegionIoFds,
    Version,
    WriteMulti,
    WriteOne,
)
from virtio_formats.wire import WireError, WireStruct

if TYPE_CHECKING:
    from vfio_user.device import PciDevice
    from vfio_user.link import Link
    from vfio_user.regions import Region
    from vfio_user.steps import Steps
    from vfio_user.stream import Message

__all__ = ("handle", "is_exclusive", "needs_quiet")

Reply = tuple[bytes, list[int]]

_ACCESS = RegionAccess.flat_struct()
"""The declaration of a region access as one :mod:`struct` format."""

_WRITE = struct.Struct(f"{_ACCESS.format}{WriteOne.SIZE - _ACCESS.size}s")
"""One write of a REGION_WRITE_MULTI: a region access with room for its data."""

Head = TypeVar("Head", bound=WireStruct)

_GROWTH_MAX = 64
"""Bytes by which a client's version of a VFIO structure may be larger than ours."""


def is_exclusive(message: Message) -> bool:
    """Return whether a command changes the device as a whole.

    Such a command is not served in the middle of the device's work.  Questions are not exclusive:
    a client that only asks must not disturb a queue.
    """
    if message.command == Command.DEVICE_FEATURE:
        return features.changes(message.payload)
    return message.command in (Command.DEVICE_RESET, Command.MIG_DATA_WRITE)


def handle(link: Link, device: PciDevice, message: Message) -> Reply | Steps[Reply]:
    """Serve one command, or return the steps that serve it where a hook may have to be waited for.

    Raise RequestError, WireError, DmaError, or what a device raises.
    """
    handler, max_fds = _HANDLERS.get(message.command, (None, 0))
    if link.client is None and message.command != Command.VERSION:
        raise FatalError(errno.EINVAL, "a command before VERSION")
    if handler is None or message.command not in CLIENT_COMMANDS:
        raise RequestError(errno.EINVAL, f"no command {message.command} for a server")
    if not message.is_command:
        raise RequestError(errno.EINVAL, f"message type {message.flags & 0xF}")
    if len(message.fds) > max_fds or len(message.fds) > link.limits.max_msg_fds:
        raise RequestError(errno.EINVAL, f"{len(message.fds)} descriptors where none belong")
    return handler(link, device, message)


def needs_quiet(message: Message) -> bool:
    """Return whether the device must be quiesced before a command is served."""
    return message.command in (Command.DMA_MAP, Command.DMA_UNMAP) or is_exclusive(message)


def _split(kind: type[Head], payload: bytes) -> tuple[Head, bytes]:
    """Return the fixed part of a payload and the bytes that follow it."""
    return kind.parse(payload[: kind.SIZE]), payload[kind.SIZE :]


def _grown(kind: type[Head], payload: bytes) -> tuple[Head, int]:
    """Return a structure of VFIO, and by how many bytes the client's version of it is larger.

    Linux appends 32-bit fields to these structures; what this server does not know it leaves zero.
    """
    if len(payload) % 4 or len(payload) > kind.SIZE + _GROWTH_MAX:
        raise RequestError(errno.EINVAL, f"{kind.__name__} of {len(payload)} bytes")
    head, rest = _split(kind, payload)
    return head, len(rest)


def _check_argsz(argsz: int, least: int, most: int | None = None) -> None:
    if argsz < least or (most is not None and argsz > most):
        raise RequestError(errno.EINVAL, f"argsz {argsz}")


# -- VERSION --------------------------------------------------------------------------------------


def version(link: Link, device: PciDevice, message: Message) -> Reply:
    """``VFIO_USER_VERSION``: settle on what both sides can do."""
    if link.client is not None:
        raise RequestError(errno.EINVAL, "VERSION a second time")
    try:
        head, data = _split(Version, message.payload)
        client = Capabilities.parse(data)
    except WireError as error:
        raise FatalError(errno.EINVAL, str(error)) from None
    if head.major != VERSION_MAJOR:
        raise FatalError(errno.EINVAL, f"version {head.major}.{head.minor} is not spoken here")
    fds = []
    if client.twin_socket and link.open_twin is not None:
        fds.append(link.open_twin())
        link.twin = True
    ours = Capabilities(
        max_msg_fds=link.limits.max_msg_fds,
        max_data_xfer_size=link.limits.max_data_xfer_size,
        max_dma_maps=link.limits.max_dma_maps,
        write_multiple=True,
        migration_pgsize=4096,
        twin_socket=bool(fds),
        twin_socket_fd_index=0 if fds else None,
    )
    # A subset of what was proposed; a client that proposed nothing at all learns our limits.
    names = client.names or frozenset({"max_msg_fds", "max_data_xfer_size", "migration"})
    link.client = client
    device.dma.channel = link.channel
    device.attached()
    minor = min(head.minor, VERSION_MINOR)
    return Version(major=VERSION_MAJOR, minor=minor).build() + ours.build(names), fds


# -- client memory --------------------------------------------------------------------------------


def dma_map(link: Link, device: PciDevice, message: Message) -> Reply:
    """``VFIO_USER_DMA_MAP``."""
    request = DmaMap.parse(message.payload)
    fd = message.fds[0] if message.fds else None
    device.dma.map(request, fd, limit=link.limits.max_dma_maps)
    message.fds.clear()  # the table's now
    return b"", []


def dma_unmap(link: Link, device: PciDevice, message: Message) -> Steps[Reply]:
    """``VFIO_USER_DMA_UNMAP``: the reply is the request's own entry."""
    request = DmaUnmap.parse(message.payload)
    _check_argsz(request.argsz, DmaUnmap.SIZE, link.limits.max_data_xfer_size)
    yield from device.dma.unmapping(request)
    return message.payload, []


# -- what the device is ---------------------------------------------------------------------------


def device_get_info(link: Link, device: PciDevice, message: Message) -> Reply:
    """``VFIO_USER_DEVICE_GET_INFO``."""
    request, more = _grown(DeviceInfo, message.payload)
    _check_argsz(request.argsz, DeviceInfo.SIZE)
    info = DeviceInfo(
        argsz=DeviceInfo.SIZE,
        flags=device.device_flags,
        num_regions=PCI_NUM_REGIONS,
        num_irqs=PCI_NUM_IRQS,
    )
    return info.build() + bytes(more), []


def _region(device: PciDevice, index: int) -> Region:
    if index >= PCI_NUM_REGIONS:
        raise RequestError(errno.EINVAL, f"no region {index}")
    return device.regions[index]


def get_region_info(link: Link, device: PciDevice, message: Message) -> Reply:
    """``VFIO_USER_DEVICE_GET_REGION_INFO``: with the file of a region that can be mapped."""
    request, _ = _split(RegionInfo, message.payload)
    _check_argsz(request.argsz, RegionInfo.SIZE)
    region = _region(device, request.index)
    fds = [os.dup(region.fd)] if region.mappable and region.fd is not None else []
    return region.describe(request.index, request.argsz), fds


def get_region_io_fds(link: Link, device: PciDevice, message: Message) -> Reply:
    """``VFIO_USER_DEVICE_GET_REGION_IO_FDS``: each descriptor goes out once."""
    request = RegionIoFds.parse(message.payload)
    _check_argsz(request.argsz, RegionIoFds.SIZE, link.limits.max_data_xfer_size)
    if request.flags or request.count:
        raise RequestError(errno.EINVAL, "GET_REGION_IO_FDS with flags or count")
    region = _region(device, request.index)
    if not region.size:
        raise RequestError(errno.EINVAL, f"region {request.index} is empty")
    events = region.io_events
    needed = RegionIoFds.SIZE + len(events) * IoEventFd.SIZE
    if request.argsz < needed:
        events = []
    files = list(dict.fromkeys(event.fd for event in events))
    if link.client is not None and len(files) > link.client.max_msg_fds:
        raise RequestError(errno.ENOSPC, f"{len(files)} descriptors are more than max_msg_fds")
    reply = RegionIoFds(argsz=needed, flags=0, index=request.index, count=len(events)).build()
    io = bool(region.bar & BarFlags.IO)
    reply += b"".join(event.describe(files.index(event.fd), io=io) for event in events)
    return reply, [os.dup(fd) for fd in files]


def get_irq_info(link: Link, device: PciDevice, message: Message) -> Reply:
    """``VFIO_USER_DEVICE_GET_IRQ_INFO``."""
    request, more = _grown(IrqInfo, message.payload)
    _check_argsz(request.argsz, IrqInfo.SIZE)
    return device.irqs.describe(request.index) + bytes(more), []


def set_irqs(link: Link, device: PciDevice, message: Message) -> Reply:
    """``VFIO_USER_DEVICE_SET_IRQS``."""
    request, data = _split(IrqSet, message.payload)
    device.irqs.set(request, data, message.fds)
    message.fds.clear()  # the interrupt table's now
    return b"", []


# -- regions --------------------------------------------------------------------------------------


def region_read(link: Link, device: PciDevice, message: Message) -> Reply:
    """``VFIO_USER_REGION_READ``."""
    request = RegionAccess.parse(message.payload)
    if request.count > link.transfer_limit:
        raise RequestError(errno.EINVAL, f"REGION_READ of {request.count} bytes")
    region = _region(device, request.region)
    return message.payload + region.access_read(request.offset, request.count), []


def region_write(link: Link, device: PciDevice, message: Message) -> Reply:
    """``VFIO_USER_REGION_WRITE``: the way of every doorbell, so without an object for the head."""
    payload = message.payload
    size = len(payload) - _ACCESS.size
    if size < 0:
        raise RequestError(errno.EINVAL, f"REGION_WRITE with {len(payload)} bytes")
    offset, index, count = _ACCESS.unpack_from(payload)
    if count != size or count > link.transfer_limit:
        raise RequestError(errno.EINVAL, f"REGION_WRITE of {count} with {size} bytes")
    _region(device, index).access_write(offset, payload[_ACCESS.size :])
    return payload[: _ACCESS.size], []


def region_write_multi(link: Link, device: PciDevice, message: Message) -> Reply:
    """``VFIO_USER_REGION_WRITE_MULTI``: in order, up to the first that is refused."""
    head, body = _split(WriteMulti, message.payload)
    if head.wr_cnt * WriteOne.SIZE != len(body):
        raise RequestError(errno.EINVAL, f"{head.wr_cnt} writes in {len(body)} bytes")
    writes = list(_WRITE.iter_unpack(body))
    if any(count > len(data) for _, _, count, data in writes):
        raise RequestError(errno.EINVAL, "a write of more than 8 bytes")
    done = 0
    for offset, index, count, data in writes:
        try:
            _region(device, index).access_write(offset, data[:count])
        except RequestError:
            if not done:
                raise
            break
        done += 1
    return WriteMulti(wr_cnt=done).build(), []


# -- the device as a whole ------------------------------------------------------------------------


def device_reset(link: Link, device: PciDevice, message: Message) -> Steps[Reply]:
    """``VFIO_USER_DEVICE_RESET``."""
    if message.payload:
        raise RequestError(errno.EINVAL, "DEVICE_RESET with a payload")
    yield from device.reset_steps()
    return b"", []


def device_feature(link: Link, device: PciDevice, message: Message) -> Steps[Reply]:
    """``VFIO_USER_DEVICE_FEATURE``."""
    limit = link.limits.max_data_xfer_size
    return (yield from features.handle(device, message.payload, limit=limit)), []


def mig_data_read(link: Link, device: PciDevice, message: Message) -> Reply:
    """``VFIO_USER_MIG_DATA_READ``."""
    request = MigData.parse(message.payload)
    _check_argsz(request.argsz, MigData.SIZE + request.size)
    if request.size > link.transfer_limit:
        raise RequestError(errno.EINVAL, f"MIG_DATA_READ of {request.size} bytes")
    data = device.migration.read(request.size)
    return MigData(argsz=MigData.SIZE + len(data), size=len(data)).build() + data, []


def mig_data_write(link: Link, device: PciDevice, message: Message) -> Reply:
    """``VFIO_USER_MIG_DATA_WRITE``."""
    request, data = _split(MigData, message.payload)
    if request.size != len(data) or request.size > link.transfer_limit:
        raise RequestError(errno.EINVAL, f"MIG_DATA_WRITE of {request.size}, {len(data)} bytes")
    device.migration.write(data)
    return b"", []


Handler = Callable[["Link", "PciDevice", "Message"], "Reply | Steps[Reply]"]

_HANDLERS: dict[int, tuple[Handler, int]] = {
    Command.VERSION: (version, 0),
    Command.DMA_MAP: (dma_map, 1),
    Command.DMA_UNMAP: (dma_unmap, 0),
    Command.DEVICE_GET_INFO: (device_get_info, 0),
    Command.DEVICE_GET_REGION_INFO: (get_region_info, 0),
    Command.DEVICE_GET_REGION_IO_FDS: (get_region_io_fds, 0),
    Command.DEVICE_GET_IRQ_INFO: (get_irq_info, 0),
    Command.DEVICE_SET_IRQS: (set_irqs, 2048),
    Command.REGION_READ: (region_read, 0),
    Command.REGION_WRITE: (region_write, 0),
    Command.DEVICE_RESET: (device_reset, 0),
    Command.REGION_WRITE_MULTI: (region_write_multi, 0),
    Command.DEVICE_FEATURE: (device_feature, 0),
    Command.MIG_DATA_READ: (mig_data_read, 0),
    Command.MIG_DATA_WRITE: (mig_data_write, 0),
}
"""Command -> handler, and how many descriptors may come with it."""
