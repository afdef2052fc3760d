# SPDX-License-Identifier: Apache-2.0
"""Client memory: DMA_MAP, DMA_UNMAP, and the server's DMA_READ and DMA_WRITE.

vfio-user specification (QEMU 11.1), sections of the same names.
"""

from __future__ import annotations

import enum

from virtio_formats.declare import c
from virtio_formats.wire import WireStruct

__all__ = (
    "DmaAccess",
    "DmaAccess32",
    "DmaMap",
    "DmaMapFlags",
    "DmaUnmap",
    "DmaUnmapFlags",
)


class DmaMapFlags(enum.IntFlag):
    """What the device may do with a DMA region."""

    READABLE = 1 << 0
    WRITEABLE = 1 << 1


class DmaUnmapFlags(enum.IntFlag):
    """``struct vfio_iommu_type1_dma_unmap`` of ``<linux/vfio.h>``.

    The specification calls the field unused; clients set UNMAP_ALL (QEMU 11.1 when it gives up a
    container), so it is understood.
    """

    GET_DIRTY_BITMAP = 1 << 0
    ALL = 1 << 1


class DmaMap(WireStruct):
    """DMA_MAP request, 32 bytes; a descriptor comes along where the region can be mapped.

    *offset*: where the region starts in that file; *address*: its DMA address; *size*: in bytes.
    """

    argsz: int
    flags: int
    offset: int
    address: int
    size: int

    SUBCON = c.Struct(
        "argsz" / c.Int32un,
        "flags" / c.Int32un,
        "offset" / c.Int64un,
        "address" / c.Int64un,
        "size" / c.Int64un,
    )


class DmaUnmap(WireStruct):
    """DMA_UNMAP request, and its reply."""

    argsz: int
    flags: int
    address: int
    size: int

    SUBCON = c.Struct(
        "argsz" / c.Int32un,
        "flags" / c.Int32un,
        "address" / c.Int64un,
        "size" / c.Int64un,
    )


class DmaAccess(WireStruct):
    """DMA_READ and DMA_WRITE, 16 bytes, followed by the data where there is some."""

    address: int
    count: int

    SUBCON = c.Struct("address" / c.Int64un, "count" / c.Int64un)


class DmaAccess32(WireStruct):
    """The same messages as the sources of QEMU 10.1 lay them out: *count* has 32 bits.

    Its data therefore begins four bytes early, at offset 12 of the payload, while the size of the
    message is still that of the 16-byte form.
    """

    address: int
    count: int

    SUBCON = c.Struct("address" / c.Int64un, "count" / c.Int32un)
