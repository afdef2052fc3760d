# SPDX-License-Identifier: Apache-2.0
"""DEVICE_FEATURE (migration, DMA logging) and the migration data stream.

vfio-user specification (QEMU 11.1), sections ``VFIO_USER_DEVICE_FEATURE`` to
``VFIO_USER_MIG_DATA_WRITE``; names and numbers as in ``<linux/vfio.h>`` (Linux 6.12).
"""

from __future__ import annotations

import enum

from virtio_formats.declare import c
from virtio_formats.wire import WireStruct

__all__ = (
    "MIG_ARCS",
    "DeviceFeature",
    "DeviceState",
    "Feature",
    "FeatureFlags",
    "LoggingControl",
    "LoggingRange",
    "LoggingReport",
    "MigData",
    "MigState",
    "Migration",
    "MigrationFlags",
)


class Feature(enum.IntEnum):
    """Feature indices that vfio-user knows (VFIO_DEVICE_FEATURE_*)."""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8


class FeatureFlags(enum.IntFlag):
    """The *flags* word: the low 16 bits are the feature index."""

    INDEX_MASK = 0xFFFF
    GET = 1 << 16
    SET = 1 << 17
    PROBE = 1 << 18


class DeviceFeature(WireStruct):
    """DEVICE_FEATURE, request and reply, 8 bytes; the feature's data follows."""

    argsz: int
    flags: int

    SUBCON = c.Struct("argsz" / c.Int32un, "flags" / c.Int32un)


class MigrationFlags(enum.IntFlag):
    """States beyond RUNNING, STOP and ERROR that a device has (VFIO_MIGRATION_*)."""

    STOP_COPY = 1 << 0
    P2P = 1 << 1
    PRE_COPY = 1 << 2


class Migration(WireStruct):
    """Data of the MIGRATION feature."""

    flags: int

    SUBCON = c.Struct("flags" / c.Int64un)


class DeviceState(enum.IntEnum):
    """``enum vfio_device_mig_state``; the two P2P states are not used in vfio-user."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


MIG_ARCS = (
    (DeviceState.RUNNING, DeviceState.STOP),
    (DeviceState.STOP_COPY, DeviceState.STOP),
    (DeviceState.RESUMING, DeviceState.STOP),
    (DeviceState.PRE_COPY, DeviceState.RUNNING),
    (DeviceState.STOP, DeviceState.RUNNING),
    (DeviceState.RUNNING, DeviceState.PRE_COPY),
    (DeviceState.STOP, DeviceState.STOP_COPY),
    (DeviceState.PRE_COPY, DeviceState.STOP_COPY),
    (DeviceState.STOP, DeviceState.RESUMING),
)
"""Section *Direct State Transitions*: the arcs that a server supports, from and to.

Arcs that touch PRE_COPY are there only where that state is.  Every other transition is the
shortest path along these arcs without PRE_COPY or STOP_COPY in its interior.
"""


class MigState(WireStruct):
    """Data of the MIG_DEVICE_STATE feature; *data_fd* is not used in vfio-user."""

    device_state: int
    data_fd: int

    SUBCON = c.Struct("device_state" / c.Int32un, "data_fd" / c.Int32un)


class LoggingControl(WireStruct):
    """Data of DMA_LOGGING_START and _STOP; *num_ranges* ranges follow (0: everything)."""

    page_size: int
    num_ranges: int
    reserved: int

    SUBCON = c.Struct("page_size" / c.Int64un, "num_ranges" / c.Int32un, "reserved" / c.Int32un)


class LoggingRange(WireStruct):
    """One range to log, in bytes."""

    iova: int
    length: int

    SUBCON = c.Struct("iova" / c.Int64un, "length" / c.Int64un)


class LoggingReport(WireStruct):
    """Data of DMA_LOGGING_REPORT, 24 bytes; the bitmap (64-bit words) follows in the reply."""

    iova: int
    length: int
    page_size: int

    SUBCON = c.Struct("iova" / c.Int64un, "length" / c.Int64un, "page_size" / c.Int64un)


class MigData(WireStruct):
    """MIG_DATA_READ and MIG_DATA_WRITE, 8 bytes; *size* bytes of data follow where due."""

    argsz: int
    size: int

    SUBCON = c.Struct("argsz" / c.Int32un, "size" / c.Int32un)
