# SPDX-License-Identifier: Apache-2.0
"""Virtio over PCI: the capabilities and the common configuration structure.

Virtual I/O Device (VIRTIO) Version 1.4, *Virtio Over PCI Bus*.  Little-endian.
"""

from __future__ import annotations

import enum

import construct as c

from virtio_formats.pci import CapId
from virtio_formats.wire import WireStruct

__all__ = (
    "MODERN_DEVICE_ID_BASE",
    "MODERN_REVISION",
    "NO_VECTOR",
    "VENDOR_ID",
    "CapType",
    "CommonConfig",
    "IsrStatus",
    "NotificationData",
    "VirtioPciCap",
    "VirtioPciCfgCap",
    "VirtioPciNotifyCap",
)

VENDOR_ID = 0x1AF4
MODERN_DEVICE_ID_BASE = 0x1040
"""*PCI Device Discovery*: a modern device's PCI ID is this plus its virtio device ID."""
MODERN_REVISION = 1
NO_VECTOR = 0xFFFF
"""VIRTIO_MSI_NO_VECTOR: no interrupt for this event, or the vector could not be had."""


class CapType(enum.IntEnum):
    """``cfg_type`` of a virtio capability (*Virtio Structure PCI Capabilities*)."""

    COMMON_CFG = 1
    NOTIFY_CFG = 2
    ISR_CFG = 3
    DEVICE_CFG = 4
    PCI_CFG = 5
    SHARED_MEMORY_CFG = 8
    VENDOR_CFG = 9


class VirtioPciCap(WireStruct):
    """``struct virtio_pci_cap``, 16 bytes: where in which BAR a structure lies, in bytes."""

    cap_vndr: int = CapId.VENDOR
    cap_next: int = 0
    cap_len: int = 16
    cfg_type: int
    bar: int = 0
    id: int = 0
    padding: bytes = b"\0\0"
    offset: int = 0
    length: int = 0

    SUBCON = c.Struct(
        "cap_vndr" / c.Int8ul,
        "cap_next" / c.Int8ul,
        "cap_len" / c.Int8ul,
        "cfg_type" / c.Int8ul,
        "bar" / c.Int8ul,
        "id" / c.Int8ul,
        "padding" / c.Bytes(2),
        "offset" / c.Int32ul,
        "length" / c.Int32ul,
    )


class VirtioPciNotifyCap(WireStruct):
    """``struct virtio_pci_notify_cap``, 20 bytes."""

    cap_vndr: int = CapId.VENDOR
    cap_next: int = 0
    cap_len: int = 20
    cfg_type: int = CapType.NOTIFY_CFG
    bar: int = 0
    id: int = 0
    padding: bytes = b"\0\0"
    offset: int = 0
    length: int = 0
    notify_off_multiplier: int

    SUBCON = c.Struct(*VirtioPciCap.SUBCON.subcons, "notify_off_multiplier" / c.Int32ul)


class VirtioPciCfgCap(WireStruct):
    """``struct virtio_pci_cfg_cap``, 20 bytes: a window on the BARs in configuration space."""

    cap_vndr: int = CapId.VENDOR
    cap_next: int = 0
    cap_len: int = 20
    cfg_type: int = CapType.PCI_CFG
    bar: int = 0
    id: int = 0
    padding: bytes = b"\0\0"
    offset: int = 0
    length: int = 0
    pci_cfg_data: bytes = b"\0\0\0\0"

    SUBCON = c.Struct(*VirtioPciCap.SUBCON.subcons, "pci_cfg_data" / c.Bytes(4))


class CommonConfig(WireStruct):
    """``struct virtio_pci_common_cfg``, 64 bytes (*Common configuration structure layout*)."""

    device_feature_select: int
    device_feature: int
    driver_feature_select: int
    driver_feature: int
    config_msix_vector: int
    num_queues: int
    device_status: int
    config_generation: int
    queue_select: int
    queue_size: int
    queue_msix_vector: int
    queue_enable: int
    queue_notify_off: int
    queue_desc: int
    queue_driver: int
    queue_device: int
    queue_notif_config_data: int
    queue_reset: int
    admin_queue_index: int
    admin_queue_num: int

    SUBCON = c.Struct(
        "device_feature_select" / c.Int32ul,
        "device_feature" / c.Int32ul,
        "driver_feature_select" / c.Int32ul,
        "driver_feature" / c.Int32ul,
        "config_msix_vector" / c.Int16ul,
        "num_queues" / c.Int16ul,
        "device_status" / c.Int8ul,
        "config_generation" / c.Int8ul,
        "queue_select" / c.Int16ul,
        "queue_size" / c.Int16ul,
        "queue_msix_vector" / c.Int16ul,
        "queue_enable" / c.Int16ul,
        "queue_notify_off" / c.Int16ul,
        "queue_desc" / c.Int64ul,
        "queue_driver" / c.Int64ul,
        "queue_device" / c.Int64ul,
        "queue_notif_config_data" / c.Int16ul,
        "queue_reset" / c.Int16ul,
        "admin_queue_index" / c.Int16ul,
        "admin_queue_num" / c.Int16ul,
    )


class IsrStatus(enum.IntFlag):
    """The ISR status byte (*ISR status capability*)."""

    QUEUE = 1 << 0
    CONFIG = 1 << 1


class NotificationData(WireStruct):
    """What a driver writes to notify with VIRTIO_F_NOTIFICATION_DATA (*Driver Notifications*).

    *next* is the next available ring offset, with packed rings the wrap counter in bit 15.
    """

    vqn: int
    next: int

    SUBCON = c.Struct("vqn" / c.Int16ul, "next" / c.Int16ul)
