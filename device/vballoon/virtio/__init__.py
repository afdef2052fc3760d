# SPDX-License-Identifier: Apache-2.0
"""The interface between devices and transports, and the rings that both use."""

from __future__ import annotations

from vballoon.virtio.device import DeviceQueue, Transport, VirtioDevice
from vballoon.virtio.events import TransportEvents
from vballoon.virtio.records import check_record, pack_record, unpack_record
from vballoon.virtio.ringset import RingFault, RingOwner, RingRecord, RingSet, internal_fault
from vballoon.virtio.status import (
    QueueStatus,
    RegionStatus,
    TransportStatus,
    feature_names,
    region_statuses,
)

__all__ = (
    "DeviceQueue",
    "QueueStatus",
    "RegionStatus",
    "RingFault",
    "RingOwner",
    "RingRecord",
    "RingSet",
    "Transport",
    "TransportEvents",
    "TransportStatus",
    "VirtioDevice",
    "check_record",
    "feature_names",
    "internal_fault",
    "pack_record",
    "region_statuses",
    "unpack_record",
)
