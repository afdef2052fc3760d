# SPDX-License-Identifier: Apache-2.0
"""Feature bits that belong to the rings and to the transport, not to one device type.

Values are bit numbers.  Read from the virtio specification, git revision 15f488c1, label
"sec:Reserved Feature Bits".
"""

from __future__ import annotations

__all__ = (
    "VIRTIO_F_ACCESS_PLATFORM",
    "VIRTIO_F_EVENT_IDX",
    "VIRTIO_F_INDIRECT_DESC",
    "VIRTIO_F_IN_ORDER",
    "VIRTIO_F_NOTIFICATION_DATA",
    "VIRTIO_F_NOTIF_CONFIG_DATA",
    "VIRTIO_F_ORDER_PLATFORM",
    "VIRTIO_F_RING_PACKED",
    "VIRTIO_F_RING_RESET",
    "VIRTIO_F_SR_IOV",
    "VIRTIO_F_VERSION_1",
    "has",
    "mask",
)

VIRTIO_F_INDIRECT_DESC = 28
"""Descriptors may refer to a table of descriptors elsewhere in memory."""
VIRTIO_F_EVENT_IDX = 29
"""Each side names the index at which it wants the next notification."""
VIRTIO_F_VERSION_1 = 32
"""The device follows version 1 of the standard or later (never legacy)."""
VIRTIO_F_ACCESS_PLATFORM = 33
"""Addresses may be limited or translated by the platform (an IOMMU)."""
VIRTIO_F_RING_PACKED = 34
"""The packed virtqueue layout."""
VIRTIO_F_IN_ORDER = 35
"""The device uses buffers in the order in which they were made available."""
VIRTIO_F_ORDER_PLATFORM = 36
"""Memory accesses are ordered in the way the platform describes."""
VIRTIO_F_SR_IOV = 37
"""Single root I/O virtualisation."""
VIRTIO_F_NOTIFICATION_DATA = 38
"""Available buffer notifications carry extra data."""
VIRTIO_F_NOTIF_CONFIG_DATA = 39
"""Available buffer notifications carry data that the device supplied."""
VIRTIO_F_RING_RESET = 40
"""A single virtqueue can be reset."""


def mask(*bits: int) -> int:
    """Return the feature word in which exactly *bits* (bit numbers) are set."""
    return sum(1 << bit for bit in set(bits))


def has(features: int, bit: int) -> bool:
    """Whether the feature word *features* has bit number *bit*."""
    return bool(features >> bit & 1)
