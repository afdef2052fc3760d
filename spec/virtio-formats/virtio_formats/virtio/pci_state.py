# SPDX-License-Identifier: Apache-2.0
"""The state of a virtio PCI function, as it travels with a migrating guest or outlives a process.

Ours, not a standard's: what MIG_DATA_READ gives and MIG_DATA_WRITE takes is each device's own.
:class:`FunctionBody` is framed by :func:`virtio_formats.vfio_user.state.seal` (magic, version,
size, checksum).  Little-endian.
"""

from __future__ import annotations

from typing import Any

import construct as c

from virtio_formats.wire import WireStruct

__all__ = ("FUNCTION_MAGIC", "FunctionBody", "QueueState")

FUNCTION_MAGIC = 0x46504256
"""``VBPF``, little-endian."""

_BYTES = c.Prefixed(c.Int32ul, c.GreedyBytes)


class QueueState(WireStruct):
    """The registers of one queue.

    *ran*: whether the device was using the ring, so that its position is in guest memory only.
    """

    desc: int
    driver: int
    device: int
    size: int
    vector: int
    enable: int
    resetting: int
    ran: int
    reserved: int = 0

    SUBCON = c.Struct(
        "desc" / c.Int64ul,
        "driver" / c.Int64ul,
        "device" / c.Int64ul,
        "size" / c.Int16ul,
        "vector" / c.Int16ul,
        "enable" / c.Int8ul,
        "resetting" / c.Int8ul,
        "ran" / c.Int8ul,
        "reserved" / c.Int8ul,
    )


class FunctionBody(WireStruct):
    """The function.

    *base* is the packed state of the PCI function without virtio
    (:mod:`virtio_formats.vfio_user.state`), *msix* the bytes of the MSI-X table, *kept* the vectors
    whose mask bit in the table counts, *rings* one
    :class:`~virtio_formats.virtio.ring_state.RingRecordFormat` after another, and *device* the
    device's own state (empty where it is kept elsewhere).
    """

    device_feature_select: int
    driver_features: int
    driver_feature_select: int
    queue_select: int
    config_msix_vector: int
    device_status: int
    config_generation: int
    isr: int
    change_due: int
    base: bytes
    msix: bytes
    kept: list[int]
    queues: list[dict[str, Any]]
    rings: bytes
    device: bytes

    SUBCON = c.Struct(
        "device_feature_select" / c.Int32ul,
        "driver_features" / c.Int64ul,
        "driver_feature_select" / c.Int32ul,
        "queue_select" / c.Int16ul,
        "config_msix_vector" / c.Int16ul,
        "device_status" / c.Int8ul,
        "config_generation" / c.Int8ul,
        "isr" / c.Int8ul,
        "change_due" / c.Int8ul,
        "base" / _BYTES,
        "msix" / _BYTES,
        "kept" / c.PrefixedArray(c.Int16ul, c.Int16ul),
        "queues" / c.PrefixedArray(c.Int16ul, QueueState.SUBCON),
        "rings" / _BYTES,
        "device" / _BYTES,
    )
