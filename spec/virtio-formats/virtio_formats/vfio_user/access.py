# SPDX-License-Identifier: Apache-2.0
"""Reading and writing device regions: REGION_READ, REGION_WRITE, REGION_WRITE_MULTI.

vfio-user specification (QEMU 11.1), sections of the same names.  A doorbell is a REGION_WRITE, so
its whole fixed part, header included, is declared once more as one flat structure: the hot path
reads it with a single unpack.
"""

from __future__ import annotations

from virtio_formats.declare import c
from virtio_formats.vfio_user.header import Header
from virtio_formats.wire import WireStruct

__all__ = ("RegionAccess", "RegionMessage", "WriteMulti", "WriteOne")


class RegionAccess(WireStruct):
    """REGION_READ and REGION_WRITE, 16 bytes, followed by *count* bytes of data if it has any."""

    offset: int
    region: int
    count: int

    SUBCON = c.Struct("offset" / c.Int64un, "region" / c.Int32un, "count" / c.Int32un)


class RegionMessage(WireStruct):
    """:class:`Header` and :class:`RegionAccess` as one, 32 bytes."""

    id: int
    command: int
    size: int
    flags: int
    error: int
    offset: int
    region: int
    count: int

    SUBCON = c.Struct(*Header.declared_fields(), *RegionAccess.declared_fields())


class WriteMulti(WireStruct):
    """REGION_WRITE_MULTI request (*wr_cnt* writes follow) and reply (how many were done)."""

    wr_cnt: int

    SUBCON = c.Struct("wr_cnt" / c.Int64un)


class WriteOne(WireStruct):
    """One write of a REGION_WRITE_MULTI; only the first *count* (at most 8) bytes of data count."""

    offset: int
    region: int
    count: int
    data: bytes

    SUBCON = c.Struct(
        "offset" / c.Int64un, "region" / c.Int32un, "count" / c.Int32un, "data" / c.Bytes(8)
    )
