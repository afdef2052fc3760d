# SPDX-License-Identifier: Apache-2.0
"""The state of a virtio PCI function as it travels with a migrating guest.

Ours, not a standard's: what MIG_DATA_READ gives and MIG_DATA_WRITE takes is each device's own.
Behind :class:`FunctionState` come, in this order: *config_size* bytes of PCI configuration space,
*msix_size* bytes of the MSI-X table, a byte of :class:`VectorFlag` for each of the *vectors*
vectors, *num_queues* times :class:`QueueState`, and *device_size* bytes of the device's own state.
Little-endian.
"""

from __future__ import annotations

import enum

import construct as c

from virtio_formats.wire import WireStruct

__all__ = ("FUNCTION_MAGIC", "FUNCTION_VERSION", "FunctionState", "QueueState", "VectorFlag")

FUNCTION_MAGIC = 0x46504256
"""``VBPF``, little-endian."""
FUNCTION_VERSION = 1
"""Raised whenever the layout changes."""


class VectorFlag(enum.IntFlag):
    """What there is to say of an MSI-X vector beside its entry."""

    PENDING = 1
    """An interrupt could not be delivered yet."""
    KEPT = 2
    """The mask bit of its entry counts; else the client keeps the table to itself."""


class FunctionState(WireStruct):
    """The head: sizes of what follows, and the registers that are not a queue's."""

    magic: int = FUNCTION_MAGIC
    version: int = FUNCTION_VERSION
    config_size: int
    msix_size: int
    vectors: int
    num_queues: int
    device_size: int
    device_feature_select: int
    driver_features: int
    driver_feature_select: int
    queue_select: int
    config_msix_vector: int
    device_status: int
    config_generation: int
    isr: int
    reserved: int = 0

    SUBCON = c.Struct(
        "magic" / c.Int32ul,
        "version" / c.Int32ul,
        "config_size" / c.Int32ul,
        "msix_size" / c.Int32ul,
        "vectors" / c.Int32ul,
        "num_queues" / c.Int32ul,
        "device_size" / c.Int32ul,
        "device_feature_select" / c.Int32ul,
        "driver_features" / c.Int64ul,
        "driver_feature_select" / c.Int32ul,
        "queue_select" / c.Int16ul,
        "config_msix_vector" / c.Int16ul,
        "device_status" / c.Int8ul,
        "config_generation" / c.Int8ul,
        "isr" / c.Int8ul,
        "reserved" / c.Int8ul,
    )


class QueueState(WireStruct):
    """One queue: its registers, and where its ring stands.

    *ran*: whether the positions mean anything (a ring that was never up starts from nothing);
    *broken*: whether it was stopped because the driver broke a rule.
    """

    desc: int
    driver: int
    device: int
    size: int
    vector: int
    enable: int
    avail: int
    used: int
    avail_wrap: int
    used_wrap: int
    ran: int
    broken: int

    SUBCON = c.Struct(
        "desc" / c.Int64ul,
        "driver" / c.Int64ul,
        "device" / c.Int64ul,
        "size" / c.Int16ul,
        "vector" / c.Int16ul,
        "enable" / c.Int16ul,
        "avail" / c.Int16ul,
        "used" / c.Int16ul,
        "avail_wrap" / c.Int8ul,
        "used_wrap" / c.Int8ul,
        "ran" / c.Int8ul,
        "broken" / c.Int8ul,
    )
