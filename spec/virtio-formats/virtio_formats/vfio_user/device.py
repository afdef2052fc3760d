# SPDX-License-Identifier: Apache-2.0
"""The description of a device: device, regions, sub-region descriptors, interrupts.

vfio-user specification (QEMU 11.1), sections ``VFIO_USER_DEVICE_GET_INFO`` to
``VFIO_USER_DEVICE_SET_IRQS``; names and numbers as in ``<linux/vfio.h>`` (Linux 6.12).
"""

from __future__ import annotations

import enum

from virtio_formats.declare import c
from virtio_formats.wire import WireStruct

__all__ = (
    "PCI_NUM_IRQS",
    "PCI_NUM_REGIONS",
    "DeviceFlags",
    "DeviceInfo",
    "InfoCapHeader",
    "InfoCapId",
    "IoEventFd",
    "IoFdType",
    "IrqInfo",
    "IrqInfoFlags",
    "IrqSet",
    "IrqSetFlags",
    "PciIrq",
    "PciRegion",
    "RegionFlags",
    "RegionInfo",
    "RegionIoFds",
    "SparseMmap",
    "SparseMmapArea",
)


class DeviceFlags(enum.IntFlag):
    """VFIO_DEVICE_FLAGS_*."""

    RESET = 1 << 0
    PCI = 1 << 1


class DeviceInfo(WireStruct):
    """DEVICE_GET_INFO, request and reply."""

    argsz: int
    flags: int
    num_regions: int
    num_irqs: int

    SUBCON = c.Struct(
        "argsz" / c.Int32un,
        "flags" / c.Int32un,
        "num_regions" / c.Int32un,
        "num_irqs" / c.Int32un,
    )


class PciRegion(enum.IntEnum):
    """Region indices of a PCI device (VFIO_PCI_*_REGION_INDEX)."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


PCI_NUM_REGIONS = 9


class RegionFlags(enum.IntFlag):
    """VFIO_REGION_INFO_FLAG_*."""

    READ = 1 << 0
    WRITE = 1 << 1
    MMAP = 1 << 2
    CAPS = 1 << 3


class RegionInfo(WireStruct):
    """DEVICE_GET_REGION_INFO, request and reply (``struct vfio_region_info``).

    *size* in bytes; *offset* is what to give to mmap(); *cap_offset* counts from the start of
    this structure, 0 where there is no capability.
    """

    argsz: int
    flags: int
    index: int
    cap_offset: int
    size: int
    offset: int

    SUBCON = c.Struct(
        "argsz" / c.Int32un,
        "flags" / c.Int32un,
        "index" / c.Int32un,
        "cap_offset" / c.Int32un,
        "size" / c.Int64un,
        "offset" / c.Int64un,
    )


class InfoCapId(enum.IntEnum):
    """VFIO_REGION_INFO_CAP_*."""

    SPARSE_MMAP = 1
    TYPE = 2


class InfoCapHeader(WireStruct):
    """``struct vfio_info_cap_header``; *next* counts from the start of the region info."""

    id: int
    version: int
    next: int

    SUBCON = c.Struct("id" / c.Int16un, "version" / c.Int16un, "next" / c.Int32un)


class SparseMmap(WireStruct):
    """The sparse mmap capability with its header; *nr_areas* areas follow."""

    id: int
    version: int
    next: int
    nr_areas: int
    reserved: int

    SUBCON = c.Struct(
        "id" / c.Int16un,
        "version" / c.Int16un,
        "next" / c.Int32un,
        "nr_areas" / c.Int32un,
        "reserved" / c.Int32un,
    )


class SparseMmapArea(WireStruct):
    """One part of a region that can be mapped; *offset* within the region, both in bytes."""

    offset: int
    size: int

    SUBCON = c.Struct("offset" / c.Int64un, "size" / c.Int64un)


class IoFdType(enum.IntEnum):
    """VFIO_USER_IO_FD_TYPE_*."""

    IOEVENTFD = 0
    IOREGIONFD = 1


class RegionIoFds(WireStruct):
    """DEVICE_GET_REGION_IO_FDS, request and reply; in the reply *count* sub-regions follow."""

    argsz: int
    flags: int
    index: int
    count: int

    SUBCON = c.Struct(
        "argsz" / c.Int32un,
        "flags" / c.Int32un,
        "index" / c.Int32un,
        "count" / c.Int32un,
    )


class IoEventFd(WireStruct):
    """A sub-region whose writes reach an eventfd; 40 bytes.

    *offset* within the region; *size* of the access in bytes, 0 where any size will do;
    *fd_index* into the descriptors of the reply.
    """

    offset: int
    size: int
    fd_index: int
    type: int
    flags: int
    padding: int
    datamatch: int

    SUBCON = c.Struct(
        "offset" / c.Int64un,
        "size" / c.Int64un,
        "fd_index" / c.Int32un,
        "type" / c.Int32un,
        "flags" / c.Int32un,
        "padding" / c.Int32un,
        "datamatch" / c.Int64un,
    )


class PciIrq(enum.IntEnum):
    """Interrupt indices of a PCI device (VFIO_PCI_*_IRQ_INDEX)."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


PCI_NUM_IRQS = 5


class IrqInfoFlags(enum.IntFlag):
    """VFIO_IRQ_INFO_*."""

    EVENTFD = 1 << 0
    MASKABLE = 1 << 1
    AUTOMASKED = 1 << 2
    NORESIZE = 1 << 3


class IrqInfo(WireStruct):
    """DEVICE_GET_IRQ_INFO, request and reply (``struct vfio_irq_info``)."""

    argsz: int
    flags: int
    index: int
    count: int

    SUBCON = c.Struct(
        "argsz" / c.Int32un,
        "flags" / c.Int32un,
        "index" / c.Int32un,
        "count" / c.Int32un,
    )


class IrqSetFlags(enum.IntFlag):
    """VFIO_IRQ_SET_*: one kind of data and one action, each exactly once."""

    DATA_NONE = 1 << 0
    DATA_BOOL = 1 << 1
    DATA_EVENTFD = 1 << 2
    ACTION_MASK = 1 << 3
    ACTION_UNMASK = 1 << 4
    ACTION_TRIGGER = 1 << 5


class IrqSet(WireStruct):
    """DEVICE_SET_IRQS request (``struct vfio_irq_set``), 20 bytes; booleans may follow."""

    argsz: int
    flags: int
    index: int
    start: int
    count: int

    SUBCON = c.Struct(
        "argsz" / c.Int32un,
        "flags" / c.Int32un,
        "index" / c.Int32un,
        "start" / c.Int32un,
        "count" / c.Int32un,
    )
