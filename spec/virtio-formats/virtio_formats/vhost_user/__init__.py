# SPDX-License-Identifier: Apache-2.0
"""The wire format of the vhost-user protocol.

The source is docs/interop/vhost-user.rst of QEMU 11.1.3; declarations cite its section titles.
**All numbers in this package are in the machine's native byte order** ("Message Specification").
"""

from __future__ import annotations

from virtio_formats.vhost_user.features import ProtocolFeature, VhostFeature, VringFlag
from virtio_formats.vhost_user.header import (
    MAX_FDS_PER_MESSAGE,
    MAX_PAYLOAD,
    VERSION,
    HeaderFlag,
    VhostUserHeader,
)
from virtio_formats.vhost_user.inflight import (
    REGION_VERSION,
    DescStatePacked,
    DescStateSplit,
    QueueRegionPacked,
    QueueRegionSplit,
    queue_region_size,
)
from virtio_formats.vhost_user.messages import MESSAGES, MessageRule
from virtio_formats.vhost_user.payloads import (
    MAX_CONFIG_SIZE,
    MAX_MEMORY_REGIONS,
    ConfigFlag,
    IotlbType,
    StateDirection,
    StatePhase,
    VhostIotlbMsg,
    VhostUserConfig,
    VhostUserInflight,
    VhostUserLog,
    VhostUserMemory,
    VhostUserMemoryRegion,
    VhostUserMemRegMsg,
    VhostUserMMap,
    VhostUserShared,
    VhostUserShMemConfig,
    VhostUserTransferDeviceState,
    VhostUserU64,
    VhostUserVringArea,
    VhostVringAddr,
    VhostVringState,
    VringFd,
)
from virtio_formats.vhost_user.requests import BackendRequest, Request, request_name

__all__ = (
    "MAX_CONFIG_SIZE",
    "MAX_FDS_PER_MESSAGE",
    "MAX_MEMORY_REGIONS",
    "MAX_PAYLOAD",
    "MESSAGES",
    "REGION_VERSION",
    "VERSION",
    "BackendRequest",
    "ConfigFlag",
    "DescStatePacked",
    "DescStateSplit",
    "HeaderFlag",
    "IotlbType",
    "MessageRule",
    "ProtocolFeature",
    "QueueRegionPacked",
    "QueueRegionSplit",
    "Request",
    "StateDirection",
    "StatePhase",
    "VhostFeature",
    "VhostIotlbMsg",
    "VhostUserConfig",
    "VhostUserHeader",
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
    "VringFlag",
    "queue_region_size",
    "request_name",
)
