# SPDX-License-Identifier: Apache-2.0
"""The rules of every front-end message in one table: payload, descriptors, reply, condition.

The source is "Communication" and "Front-end message types" of vhost-user.rst, QEMU 11.1.3.  A
back-end uses the table to refuse malformed messages, a front-end to know which reply to expect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from virtio_formats.vhost_user.features import ProtocolFeature
from virtio_formats.vhost_user.payloads import (
    MAX_MEMORY_REGIONS,
    VhostIotlbMsg,
    VhostUserConfig,
    VhostUserInflight,
    VhostUserLog,
    VhostUserMemory,
    VhostUserMemRegMsg,
    VhostUserShared,
    VhostUserShMemConfig,
    VhostUserTransferDeviceState,
    VhostUserU64,
    VhostVringAddr,
    VhostVringState,
)
from virtio_formats.vhost_user.requests import Request
from virtio_formats.wire import Buffer, WireError, WireStruct

__all__ = ("MESSAGES", "MessageRule")


@dataclass(frozen=True, slots=True)
class MessageRule:
    """The rule of one front-end message.

    *payload* and *reply* are None if the message has none; a message without *reply* is
    acknowledged by a u64 under REPLY_ACK.  *fds* is the minimum and maximum number of descriptors.
    *feature* is the protocol feature that must have been acknowledged, or only offered if *offered*
    is set (the wording differs between messages).
    """

    payload: type[WireStruct] | None = None
    reply: type[WireStruct] | None = None
    fds: tuple[int, int] = (0, 0)
    feature: ProtocolFeature | None = None
    offered: bool = False

    def parse(self, data: Buffer) -> Any:
        """Return the payload: an instance of *payload*, a list of regions, or None.

        Raise :class:`~virtio_formats.wire.WireError` for a payload of the wrong size or shape.
        """
        if self.payload is None:
            if data:
                raise WireError(f"{len(data)} bytes of payload instead of none")
            return None
        if self.payload is VhostUserMemory:
            return VhostUserMemory.parse_table(data)
        if self.payload is VhostUserInflight and len(data) == VhostUserInflight.SIZE - 4:
            data = bytes(data) + bytes(4)  # the fields alone, without the struct's tail padding
        return self.payload.parse(data)


F = ProtocolFeature
R = Request
_U64, _STATE = VhostUserU64, VhostVringState

MESSAGES: dict[Request, MessageRule] = {
    R.GET_FEATURES: MessageRule(reply=_U64),
    R.SET_FEATURES: MessageRule(_U64),
    R.SET_OWNER: MessageRule(),
    R.RESET_OWNER: MessageRule(),
    R.SET_MEM_TABLE: MessageRule(VhostUserMemory, fds=(0, MAX_MEMORY_REGIONS)),
    R.SET_LOG_BASE: MessageRule(VhostUserLog, _U64, (1, 1), F.LOG_SHMFD),
    R.SET_LOG_FD: MessageRule(fds=(1, 1)),
    R.SET_VRING_NUM: MessageRule(_STATE),
    R.SET_VRING_ADDR: MessageRule(VhostVringAddr),
    R.SET_VRING_BASE: MessageRule(_STATE),
    R.GET_VRING_BASE: MessageRule(_STATE, _STATE),
    R.SET_VRING_KICK: MessageRule(_U64, fds=(0, 1)),
    R.SET_VRING_CALL: MessageRule(_U64, fds=(0, 1)),
    R.SET_VRING_ERR: MessageRule(_U64, fds=(0, 1)),
    R.GET_PROTOCOL_FEATURES: MessageRule(reply=_U64),
    R.SET_PROTOCOL_FEATURES: MessageRule(_U64),
    R.GET_QUEUE_NUM: MessageRule(reply=_U64, feature=F.MQ, offered=True),
    R.SET_VRING_ENABLE: MessageRule(_STATE),
    R.SEND_RARP: MessageRule(_U64, feature=F.RARP),
    R.NET_SET_MTU: MessageRule(_U64, feature=F.MTU),
    R.SET_BACKEND_REQ_FD: MessageRule(fds=(1, 1), feature=F.BACKEND_REQ, offered=True),
    R.IOTLB_MSG: MessageRule(VhostIotlbMsg, _U64),
    R.SET_VRING_ENDIAN: MessageRule(_STATE, feature=F.CROSS_ENDIAN),
    R.GET_CONFIG: MessageRule(VhostUserConfig, VhostUserConfig, feature=F.CONFIG),
    R.SET_CONFIG: MessageRule(VhostUserConfig, feature=F.CONFIG),
    R.POSTCOPY_ADVISE: MessageRule(feature=F.PAGEFAULT),
    R.POSTCOPY_LISTEN: MessageRule(feature=F.PAGEFAULT),
    R.POSTCOPY_END: MessageRule(reply=_U64, feature=F.PAGEFAULT),
    R.GET_INFLIGHT_FD: MessageRule(VhostUserInflight, VhostUserInflight, feature=F.INFLIGHT_SHMFD),
    R.SET_INFLIGHT_FD: MessageRule(VhostUserInflight, fds=(1, 1), feature=F.INFLIGHT_SHMFD),
    R.GPU_SET_SOCKET: MessageRule(fds=(1, 1)),
    R.RESET_DEVICE: MessageRule(feature=F.RESET_DEVICE, offered=True),
    R.VRING_KICK: MessageRule(_STATE, feature=F.INBAND_NOTIFICATIONS),
    R.GET_MAX_MEM_SLOTS: MessageRule(reply=_U64, feature=F.CONFIGURE_MEM_SLOTS),
    R.ADD_MEM_REG: MessageRule(VhostUserMemRegMsg, fds=(1, 1), feature=F.CONFIGURE_MEM_SLOTS),
    R.REM_MEM_REG: MessageRule(VhostUserMemRegMsg, fds=(0, 1), feature=F.CONFIGURE_MEM_SLOTS),
    R.SET_STATUS: MessageRule(_U64, feature=F.STATUS),
    R.GET_STATUS: MessageRule(reply=_U64, feature=F.STATUS),
    R.GET_SHARED_OBJECT: MessageRule(VhostUserShared, _U64, feature=F.SHARED_OBJECT),
    R.SET_DEVICE_STATE_FD: MessageRule(VhostUserTransferDeviceState, _U64, (1, 1), F.DEVICE_STATE),
    R.CHECK_DEVICE_STATE: MessageRule(reply=_U64, feature=F.DEVICE_STATE),
    R.GET_SHMEM_CONFIG: MessageRule(reply=VhostUserShMemConfig, feature=F.SHMEM_MAP),
}
"""All messages except the two of a crypto device, whose payload the document does not define."""
