# SPDX-License-Identifier: Apache-2.0
"""The commands of a client: what is sent, and how the reply is read.

Neither a socket nor a session: :class:`vfio_user.client.Client` sends them over a socket,
:class:`vfio_user.testing.LocalClient` hands them to a session in the same process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from virtio_formats.vfio_user import (
    Capabilities,
    Command,
    DeviceFeature,
    DeviceInfo,
    DmaMap,
    DmaMapFlags,
    DmaUnmap,
    Feature,
    FeatureFlags,
    IrqInfo,
    IrqSet,
    IrqSetFlags,
    MigData,
    MigState,
    RegionAccess,
    RegionInfo,
    Version,
)

__all__ = (
    "Reply",
    "Request",
    "assign_irqs",
    "device_info",
    "dma_map",
    "dma_unmap",
    "get_state",
    "irq_info",
    "read_state",
    "region_info",
    "region_read",
    "region_write",
    "reset",
    "set_irqs",
    "set_state",
    "version",
    "write_state",
)

T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """The payload of a reply, and its descriptors, which are the receiver's."""

    payload: bytes
    fds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request(Generic[T]):
    """One command: its payload, descriptors to send (they stay the caller's), and the parser."""

    command: Command
    payload: bytes
    parse: Callable[[Reply], T]
    fds: tuple[int, ...] = ()


def _nothing(reply: Reply) -> None:
    """Return None: the reply says nothing but that it was done."""


def version(capabilities: Capabilities) -> Request[Capabilities]:
    """Negotiate; the reply is what the server can do."""
    payload = Version(major=0, minor=0).build() + capabilities.build()
    return Request(
        Command.VERSION, payload, lambda reply: Capabilities.parse(reply.payload[Version.SIZE :])
    )


def dma_map(
    address: int, size: int, *, fd: int | None = None, offset: int = 0, flags: int | None = None
) -> Request[None]:
    """Map *size* bytes of client memory at *address*; without *fd* it is reached by messages."""
    both = DmaMapFlags.READABLE | DmaMapFlags.WRITEABLE
    request = DmaMap(
        argsz=DmaMap.SIZE,
        flags=both if flags is None else flags,
        offset=offset,
        address=address,
        size=size,
    )
    return Request(Command.DMA_MAP, request.build(), _nothing, () if fd is None else (fd,))


def dma_unmap(address: int, size: int, *, flags: int = 0) -> Request[None]:
    """Unmap what :func:`dma_map` mapped."""
    request = DmaUnmap(argsz=DmaUnmap.SIZE, flags=flags, address=address, size=size)
    return Request(Command.DMA_UNMAP, request.build(), _nothing)


def device_info() -> Request[DeviceInfo]:
    """Ask how many regions and interrupt indices there are."""
    request = DeviceInfo(argsz=DeviceInfo.SIZE, flags=0, num_regions=0, num_irqs=0)
    return Request(
        Command.DEVICE_GET_INFO, request.build(), lambda reply: DeviceInfo.parse(reply.payload)
    )


def region_info(index: int) -> Request[tuple[RegionInfo, bytes, tuple[int, ...]]]:
    """Ask for a region: its description, its capabilities, and its file if it can be mapped."""
    request = RegionInfo(argsz=4096, flags=0, index=index, cap_offset=0, size=0, offset=0)

    def parse(reply: Reply) -> tuple[RegionInfo, bytes, tuple[int, ...]]:
        head, caps = reply.payload[: RegionInfo.SIZE], reply.payload[RegionInfo.SIZE :]
        return RegionInfo.parse(head), caps, reply.fds

    return Request(Command.DEVICE_GET_REGION_INFO, request.build(), parse)


def irq_info(index: int) -> Request[IrqInfo]:
    """Ask for an interrupt index: how many vectors, and what they can do."""
    request = IrqInfo(argsz=IrqInfo.SIZE, flags=0, index=index, count=0)
    return Request(
        Command.DEVICE_GET_IRQ_INFO, request.build(), lambda reply: IrqInfo.parse(reply.payload)
    )


def set_irqs(
    index: int,
    flags: int,
    *,
    start: int = 0,
    count: int = 0,
    data: bytes = b"",
    fds: Sequence[int] = (),
    argsz: int | None = None,
) -> Request[None]:
    """Change vectors *start* to *start* + *count*; *flags* are of ``IrqSetFlags``."""
    request = IrqSet(
        argsz=IrqSet.SIZE + len(data) if argsz is None else argsz,
        flags=flags,
        index=index,
        start=start,
        count=count,
    )
    return Request(Command.DEVICE_SET_IRQS, request.build() + data, _nothing, tuple(fds))


def assign_irqs(index: int, fds: Sequence[int], *, start: int = 0) -> Request[None]:
    """Give eventfds to vectors, from vector *start* on."""
    flags = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
    return set_irqs(index, flags, start=start, count=len(fds), fds=fds)


def region_read(region: int, offset: int, count: int) -> Request[bytes]:
    """Read *count* bytes of a region."""
    request = RegionAccess(offset=offset, region=region, count=count)
    return Request(
        Command.REGION_READ, request.build(), lambda reply: reply.payload[RegionAccess.SIZE :]
    )


def region_write(region: int, offset: int, data: bytes) -> Request[None]:
    """Write to a region."""
    request = RegionAccess(offset=offset, region=region, count=len(data))
    return Request(Command.REGION_WRITE, request.build() + data, _nothing)


def reset() -> Request[None]:
    """Reset the device."""
    return Request(Command.DEVICE_RESET, b"", _nothing)


def _feature(flags: int, data: bytes, parse: Callable[[bytes], T]) -> Request[T]:
    request = DeviceFeature(argsz=DeviceFeature.SIZE + MigState.SIZE, flags=flags)
    return Request(
        Command.DEVICE_FEATURE,
        request.build() + data,
        lambda reply: parse(reply.payload[DeviceFeature.SIZE :]),
    )


def get_state() -> Request[int]:
    """Ask for the migration state, one of ``DeviceState``."""
    flags = FeatureFlags.GET | Feature.MIG_DEVICE_STATE
    return _feature(flags, b"", lambda data: MigState.parse(data).device_state)


def set_state(state: int) -> Request[None]:
    """Go to a migration state."""
    data = MigState(device_state=state, data_fd=0).build()
    return _feature(FeatureFlags.SET | Feature.MIG_DEVICE_STATE, data, lambda data: None)


def read_state(size: int) -> Request[bytes]:
    """Read the next *size* bytes of the device's state; fewer mean that there are no more."""
    request = MigData(argsz=MigData.SIZE + size, size=size)
    return Request(
        Command.MIG_DATA_READ, request.build(), lambda reply: reply.payload[MigData.SIZE :]
    )


def write_state(data: bytes) -> Request[None]:
    """Write the next bytes of the device's state."""
    head = MigData(argsz=MigData.SIZE + len(data), size=len(data))
    return Request(Command.MIG_DATA_WRITE, head.build() + data, _nothing)
