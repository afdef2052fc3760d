# SPDX-License-Identifier: Apache-2.0
"""Payloads ("Payload", vhost-user.rst, QEMU 11.1.3).  Classes have the names of QEMU's structs.

The docstring of each class is the subsection of "Payload" that it declares.  Sizes are in bytes.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Any, Self

import construct as c

from virtio_formats.wire import Buffer, WireError, WireStruct

__all__ = (
    "MAX_CONFIG_SIZE",
    "MAX_MEMORY_REGIONS",
    "ConfigFlag",
    "IotlbType",
    "StateDirection",
    "StatePhase",
    "VhostIotlbMsg",
    "VhostUserConfig",
    "VhostUserInflight",
    "VhostUserLog",
    "VhostUserMMap",
    "VhostUserMemRegMsg",
    "VhostUserMemory",
    "VhostUserMemoryRegion",
    "VhostUserShMemConfig",
    "VhostUserShared",
    "VhostUserTransferDeviceState",
    "VhostUserU64",
    "VhostUserVringArea",
    "VhostVringAddr",
    "VhostVringState",
    "VringFd",
)

MAX_MEMORY_REGIONS = 8
"""Maximum number of regions in SET_MEM_TABLE ("Multiple Memory regions description")."""

MAX_CONFIG_SIZE = 256
"""Maximum bytes of configuration space in a message (QEMU's VHOST_USER_MAX_CONFIG_SIZE)."""


class VringFd(IntFlag):
    """The u64 of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR
    ("VHOST_USER_SET_VRING_KICK")."""

    INDEX_MASK = 0xFF
    INVALID_FD = 1 << 8


class ConfigFlag(IntEnum):
    """The flags of "Virtio device config space"."""

    WRITABLE = 0
    MIGRATION = 1


class IotlbType(IntEnum):
    """The type of "An IOTLB message"."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4


class StateDirection(IntEnum):
    """The direction of "Device state transfer parameters"."""

    SAVE = 0
    LOAD = 1


class StatePhase(IntEnum):
    """The migration phase of "Device state transfer parameters"."""

    STOPPED = 0


class VhostUserU64(WireStruct):
    """A single 64-bit integer."""

    u64: int

    SUBCON = c.Struct("u64" / c.Int64un)


class VhostVringState(WireStruct):
    """A vring state description; also the descriptor index of a split or packed vring."""

    index: int
    num: int

    SUBCON = c.Struct("index" / c.Int32un, "num" / c.Int32un)


class VhostVringAddr(WireStruct):
    """A vring address description."""

    index: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int

    SUBCON = c.Struct(
        "index" / c.Int32un,
        "flags" / c.Int32un,
        "descriptor" / c.Int64un,
        "used" / c.Int64un,
        "available" / c.Int64un,
        "log" / c.Int64un,
    )


class VhostUserMemoryRegion(WireStruct):
    """Memory region description."""

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int

    SUBCON = c.Struct(
        "guest_address" / c.Int64un,
        "size" / c.Int64un,
        "user_address" / c.Int64un,
        "mmap_offset" / c.Int64un,
    )


class VhostUserMemRegMsg(WireStruct):
    """Single memory region description: padding, then the fields of a region."""

    padding: int
    guest_address: int
    size: int
    user_address: int
    mmap_offset: int

    SUBCON = c.Struct("padding" / c.Int64un, *VhostUserMemoryRegion.SUBCON.subcons)

    @property
    def region(self) -> VhostUserMemoryRegion:
        """The region without the padding of the message."""
        return VhostUserMemoryRegion(
            guest_address=self.guest_address,
            size=self.size,
            user_address=self.user_address,
            mmap_offset=self.mmap_offset,
        )


class VhostUserMemory(WireStruct):
    """Multiple Memory regions description.

    Front-ends send either the valid regions, or eight regions of which the last are undefined.
    :meth:`parse_table` reads both forms; :meth:`build` writes the short form.
    """

    num_regions: int
    padding: int
    regions: list[Any]

    SUBCON = c.Struct(
        "num_regions" / c.Int32un,
        "padding" / c.Int32un,
        "regions" / c.Array(c.this.num_regions, VhostUserMemoryRegion.SUBCON),
    )

    @classmethod
    def of(cls, regions: list[VhostUserMemoryRegion]) -> Self:
        """Return the table of *regions*."""
        return cls(num_regions=len(regions), padding=0, regions=regions)

    @classmethod
    def parse_table(cls, data: Buffer) -> list[VhostUserMemoryRegion]:
        """Return the regions of either form.  Raise :class:`~virtio_formats.wire.WireError`."""
        step, full = VhostUserMemoryRegion.SIZE, 8 + MAX_MEMORY_REGIONS * VhostUserMemoryRegion.SIZE
        count = VhostVringState.parse(data[:8]).index
        if count > MAX_MEMORY_REGIONS:
            raise WireError(f"{count} memory regions, at most {MAX_MEMORY_REGIONS}")
        if len(data) not in (8 + count * step, full):
            raise WireError(f"{len(data)} bytes for a table of {count} regions")
        return [
            VhostUserMemoryRegion.parse(data[8 + i * step : 8 + (i + 1) * step])
            for i in range(count)
        ]


class VhostUserLog(WireStruct):
    """Log description."""

    mmap_size: int
    mmap_offset: int

    SUBCON = c.Struct("mmap_size" / c.Int64un, "mmap_offset" / c.Int64un)


class VhostIotlbMsg(WireStruct):
    """An IOTLB message (``struct vhost_iotlb_msg``, with its tail padding)."""

    iova: int
    size: int
    uaddr: int
    perm: int
    type: int
    padding: bytes

    SUBCON = c.Struct(
        "iova" / c.Int64un,
        "size" / c.Int64un,
        "uaddr" / c.Int64un,
        "perm" / c.Int8un,
        "type" / c.Int8un,
        "padding" / c.Bytes(6),
    )


class VhostUserConfig(WireStruct):
    """Virtio device config space; *region* is the data after the three numbers."""

    offset: int
    size: int
    flags: int
    region: bytes

    SUBCON = c.Struct(
        "offset" / c.Int32un,
        "size" / c.Int32un,
        "flags" / c.Int32un,
        "region" / c.GreedyBytes,
    )
    HEADER_SIZE = 12


class VhostUserVringArea(WireStruct):
    """Vring area description."""

    u64: int
    size: int
    offset: int

    SUBCON = c.Struct("u64" / c.Int64un, "size" / c.Int64un, "offset" / c.Int64un)


class VhostUserInflight(WireStruct):
    """Inflight description.  The C struct ends in four bytes of padding, which QEMU sends."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int
    padding: int = 0

    SUBCON = c.Struct(
        "mmap_size" / c.Int64un,
        "mmap_offset" / c.Int64un,
        "num_queues" / c.Int16un,
        "queue_size" / c.Int16un,
        "padding" / c.Int32un,
    )


class VhostUserShared(WireStruct):
    """VhostUserShared."""

    uuid: bytes

    SUBCON = c.Struct("uuid" / c.Bytes(16))


class VhostUserTransferDeviceState(WireStruct):
    """Device state transfer parameters."""

    direction: int
    phase: int

    SUBCON = c.Struct("direction" / c.Int32un, "phase" / c.Int32un)


class VhostUserMMap(WireStruct):
    """MMAP request."""

    shmid: int
    padding: bytes
    fd_offset: int
    shm_offset: int
    len: int
    flags: int

    SUBCON = c.Struct(
        "shmid" / c.Int8un,
        "padding" / c.Bytes(7),
        "fd_offset" / c.Int64un,
        "shm_offset" / c.Int64un,
        "len" / c.Int64un,
        "flags" / c.Int64un,
    )


class VhostUserShMemConfig(WireStruct):
    """VIRTIO Shared Memory Region configuration."""

    num_regions: int
    padding: int
    mem_sizes: list[int]

    SUBCON = c.Struct(
        "num_regions" / c.Int32un,
        "padding" / c.Int32un,
        "mem_sizes" / c.Array(256, c.Int64un),
    )
