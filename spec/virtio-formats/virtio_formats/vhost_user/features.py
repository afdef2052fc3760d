# SPDX-License-Identifier: Apache-2.0
"""Feature bits of the transport ("Communication", "Protocol features", vhost-user.rst, 11.1.3).

Members are masks, not bit numbers: ``ProtocolFeature.MQ`` is ``1 << 0``.
"""

from __future__ import annotations

from enum import IntFlag

__all__ = ("ProtocolFeature", "VhostFeature", "VringFlag")


class VhostFeature(IntFlag):
    """Bits of GET_FEATURES / SET_FEATURES that belong to the transport, not to virtio.

    ``LOG_ALL`` is VHOST_F_LOG_ALL ("Migration"); ``PROTOCOL_FEATURES`` is
    VHOST_USER_F_PROTOCOL_FEATURES ("Communication").
    """

    LOG_ALL = 1 << 26
    PROTOCOL_FEATURES = 1 << 30


class ProtocolFeature(IntFlag):
    """VHOST_USER_PROTOCOL_F_* ("Protocol features")."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM_MAP = 1 << 22


class VringFlag(IntFlag):
    """Bits of "A vring address description"'s flags ("Migration": VHOST_VRING_F_LOG)."""

    LOG = 1 << 0
