# SPDX-License-Identifier: Apache-2.0
"""A vhost-user front-end: every message, in any order, well-formed or not."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from virtio_conformance.findings import Finding, Hang
from virtio_conformance.memory import GuestRam, Region
from virtio_conformance.wiretap import Tap
from virtio_formats.vhost_user.features import ProtocolFeature, VhostFeature
from virtio_formats.vhost_user.header import VERSION, HeaderFlag, VhostUserHeader
from virtio_formats.vhost_user.payloads import (
    VhostUserConfig,
    VhostUserMemory,
    VhostUserMemoryRegion,
    VhostUserMemRegMsg,
    VhostUserU64,
    VhostVringAddr,
    VhostVringState,
    VringFd,
)
from virtio_formats.vhost_user.requests import Request, request_name

__all__ = ("FrontEnd", "Reply", "region_payload")

HEADER = VhostUserHeader.SIZE
REPLY = "vu.header.reply"
WITH_REPLY = frozenset(
    {
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_VRING_BASE,
        Request.GET_QUEUE_NUM,
        Request.GET_CONFIG,
        Request.GET_INFLIGHT_FD,
        Request.GET_MAX_MEM_SLOTS,
        Request.GET_STATUS,
        Request.SET_DEVICE_STATE_FD,
        Request.CHECK_DEVICE_STATE,
        Request.GET_SHMEM_CONFIG,
    }
)
"""Requests that always have a reply of their own."""


@dataclass
class Reply:
    """A reply: the header's fields, the payload, and descriptors, which the caller closes."""

    request: int
    flags: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def u64(self) -> int:
        """The payload as one integer."""
        if len(self.payload) != VhostUserU64.SIZE:
            raise Finding(f"a reply of {len(self.payload)} bytes, expected 8", row=REPLY)
        return VhostUserU64.parse(self.payload).u64


def region_payload(region: Region) -> VhostUserMemoryRegion:
    """Return the description of a region that the back-end gets."""
    return VhostUserMemoryRegion(
        guest_address=region.guest,
        size=region.size,
        user_address=region.user,
        mmap_offset=region.offset,
    )


class FrontEnd:
    """One connection to a vhost-user back-end."""

    def __init__(self, sock: socket.socket, limit: float = 2.0, first: float = 0.0) -> None:
        self.tap = Tap(sock, limit, first)
        self.features = 0
        self.protocol = ProtocolFeature(0)
        self.acked = 0

    def close(self) -> None:
        """Disconnect."""
        self.tap.close()

    # -- messages ----------------------------------------------------------------------------

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
        flags: int | None = None,
        size: int | None = None,
    ) -> None:
        """Send a message; *flags* and *size* override the correct values of the header."""
        if flags is None:
            flags = VERSION | (HeaderFlag.NEED_REPLY if need_reply else 0)
        length = len(payload) if size is None else size
        header = VhostUserHeader(request=request, flags=flags, size=length)
        self.tap.note(
            f"-> {request_name(request)} flags={flags:#x} size={length}"
            f" payload={payload[:40].hex()} fds={len(fds)}"
        )
        self.tap.send(header.build() + payload, fds)

    def receive(self, limit: float | None = None) -> Reply:
        """Return the next message from the back-end on this connection."""
        raw, fds = self.tap.receive(HEADER, limit)
        header = VhostUserHeader.parse(raw)
        if header.size > 65536:
            raise Finding(f"a reply announces {header.size} bytes")
        payload, more = self.tap.receive(header.size, limit) if header.size else (b"", [])
        self.tap.note(
            f"<- {request_name(header.request)} flags={header.flags:#x}"
            f" size={header.size} payload={payload[:40].hex()} fds={len(fds + more)}"
        )
        return Reply(header.request, header.flags, payload, fds + more)

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Reply:
        """Send a request, check the header of its reply, and return the reply."""
        self.send(request, payload, fds)
        return self.expect_reply(request)

    def expect_reply(self, request: int) -> Reply:
        """Return the reply to *request*, whose header has to match."""
        reply = self.receive()
        if reply.request != request:
            raise Finding(
                f"a reply to {request_name(reply.request)} where one to"
                f" {request_name(request)} is due",
                row=REPLY,
            )
        if reply.flags != VERSION | HeaderFlag.REPLY:
            told = f"reply flags {reply.flags:#x}, expected version 1 and the reply bit"
            raise Finding(told, row=REPLY)
        return reply

    def do(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a request that has to succeed; with REPLY_ACK the back-end confirms it."""
        result = self.attempt(request, payload, fds)
        if result:
            raise Finding(f"{request_name(request)} was refused ({result})")

    def attempt(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send a request and return the back-end's result; 0 for success, or without REPLY_ACK."""
        if not self.protocol & ProtocolFeature.REPLY_ACK:
            self.send(request, payload, fds)
            return 0
        self.send(request, payload, fds, need_reply=True)
        return self.expect_reply(request).u64

    def barrier(self) -> None:
        """Return after all messages sent so far were processed."""
        self.ask(Request.GET_FEATURES)

    # -- negotiation -------------------------------------------------------------------------

    def get_u64(self, request: int) -> int:
        """Send a request without payload and return its 64-bit answer."""
        return self.ask(request).u64

    def negotiate(self, features: int, protocol: int) -> None:
        """Negotiate in QEMU's order; *features* and *protocol* are masks of what is accepted."""
        self.features = self.get_u64(Request.GET_FEATURES)
        if self.features & VhostFeature.PROTOCOL_FEATURES:
            offered = self.get_u64(Request.GET_PROTOCOL_FEATURES)
            self.send(Request.SET_PROTOCOL_FEATURES, VhostUserU64(u64=offered & protocol).build())
            self.protocol = ProtocolFeature(offered & protocol)
        self.do(Request.SET_OWNER)
        self.acked = self.features & (features | VhostFeature.PROTOCOL_FEATURES)
        self.set_features(self.acked)

    def set_features(self, features: int) -> None:
        """Send SET_FEATURES, which has to be accepted."""
        self.do(Request.SET_FEATURES, VhostUserU64(u64=features).build())

    def set_memory(self, ram: GuestRam) -> None:
        """Share the whole memory in one table."""
        table = VhostUserMemory.of([region_payload(region) for region in ram.regions])
        self.do(Request.SET_MEM_TABLE, table.build(), [region.fd for region in ram.regions])

    def add_region(self, region: Region) -> int:
        """Send ADD_MEM_REG and return the back-end's result (0: success)."""
        body = region_payload(region)
        message = VhostUserMemRegMsg(
            padding=0,
            guest_address=body.guest_address,
            size=body.size,
            user_address=body.user_address,
            mmap_offset=body.mmap_offset,
        )
        return self.attempt(Request.ADD_MEM_REG, message.build(), [region.fd])

    def remove_region(self, region: Region, fds: Sequence[int] = ()) -> int:
        """Send REM_MEM_REG and return the back-end's result (0: success)."""
        message = VhostUserMemRegMsg(
            padding=0,
            guest_address=region.guest,
            size=region.size,
            user_address=region.user,
            mmap_offset=0,  # the standard says that it is ignored
        )
        return self.attempt(Request.REM_MEM_REG, message.build(), fds)

    # -- rings -------------------------------------------------------------------------------

    def vring(self, request: int, index: int, num: int) -> None:
        """Send a request with a vring state, which has to succeed."""
        self.do(request, VhostVringState(index=index, num=num).build())

    def vring_addr(
        self,
        index: int,
        areas: tuple[int, int, int],
        ram: GuestRam,
        *,
        flags: int = 0,
        log: int = 0,
    ) -> None:
        """Send SET_VRING_ADDR for guest-physical areas (descriptors, driver, device)."""
        desc, driver, device = (ram.user(area) for area in areas)
        message = VhostVringAddr(
            index=index, flags=flags, descriptor=desc, used=device, available=driver, log=log
        )
        self.do(Request.SET_VRING_ADDR, message.build())

    def vring_fd(self, request: int, index: int, fd: int | None) -> None:
        """Send SET_VRING_KICK, _CALL or _ERR, with a descriptor or with the flag for none."""
        word = index | (VringFd.INVALID_FD if fd is None else 0)
        self.do(request, VhostUserU64(u64=word).build(), [] if fd is None else [fd])

    def get_base(self, index: int) -> int:
        """Send GET_VRING_BASE, which stops the ring, and return the base."""
        reply = self.ask(Request.GET_VRING_BASE, VhostVringState(index=index, num=0).build())
        if len(reply.payload) != VhostVringState.SIZE:
            raise Finding(f"GET_VRING_BASE answers with {len(reply.payload)} bytes")
        state = VhostVringState.parse(reply.payload)
        if state.index != index:
            raise Finding(f"GET_VRING_BASE of ring {index} answers for ring {state.index}")
        return state.num

    # -- configuration -----------------------------------------------------------------------

    def get_config(self, offset: int, size: int) -> bytes:
        """Return bytes of the configuration space; nothing for an error reply."""
        request = VhostUserConfig(offset=offset, size=size, flags=0, region=bytes(size))
        reply = self.ask(Request.GET_CONFIG, request.build())
        if not reply.payload:
            return b""
        if len(reply.payload) < VhostUserConfig.HEADER_SIZE:
            raise Finding(f"GET_CONFIG answers with {len(reply.payload)} bytes")
        return VhostUserConfig.parse(reply.payload).region

    def set_config(self, offset: int, data: bytes, flags: int = 0) -> int:
        """Write configuration space and return the back-end's result (0: success)."""
        message = VhostUserConfig(offset=offset, size=len(data), flags=flags, region=data)
        return self.attempt(Request.SET_CONFIG, message.build())

    # -- health ------------------------------------------------------------------------------

    def usable(self) -> bool:
        """Return True if the connection answers, False if it was closed.  Else raise Hang."""
        if self.tap.closed:
            return False
        try:
            self.send(Request.GET_FEATURES)
            while (reply := self.receive()).request != Request.GET_FEATURES:
                for fd in reply.fds:  # the reply to what a test sent before
                    os.close(fd)
        except Hang:
            raise Hang("the control socket does not answer any more") from None
        except Finding:
            return not self.tap.closed
        return True
