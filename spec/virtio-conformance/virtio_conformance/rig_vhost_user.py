# SPDX-License-Identifier: Apache-2.0
"""Bring a device up over vhost-user, in QEMU's order."""

from __future__ import annotations

import contextlib
import time

from virtio_conformance.findings import Closed, Finding, not_applicable
from virtio_conformance.memory import Picture
from virtio_conformance.observe import EventFd
from virtio_conformance.profiles import Profile
from virtio_conformance.rig import Rig
from virtio_conformance.ring import DriverRing
from virtio_conformance.ring_split import SplitRing
from virtio_conformance.target import Target
from virtio_conformance.vhost_user import FrontEnd
from virtio_formats.vhost_user.features import ProtocolFeature, VhostFeature
from virtio_formats.vhost_user.payloads import VhostUserU64, VhostVringAddr, VhostVringState
from virtio_formats.vhost_user.requests import Request
from virtio_formats.virtio.status import DeviceStatus as S

__all__ = ("COMMON_PROTOCOL", "VhostUserRig")

P = ProtocolFeature
COMMON_PROTOCOL = int(
    P.MQ
    | P.LOG_SHMFD
    | P.REPLY_ACK
    | P.BACKEND_REQ
    | P.CONFIG
    | P.RESET_DEVICE
    | P.CONFIGURE_MEM_SLOTS
    | P.STATUS
)
"""Protocol features that a front-end can accept without further obligations.

(INFLIGHT_SHMFD without SET_INFLIGHT_FD makes some back-ends close the connection.)
"""
READY = S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK | S.DRIVER_OK
VHOST_BITS = int(VhostFeature.LOG_ALL | VhostFeature.PROTOCOL_FEATURES)


class VhostUserRig(Rig):
    """A device that a vhost-user back-end serves."""

    transport = "vhost-user"
    can_stop = True
    protocol = COMMON_PROTOCOL

    def __init__(
        self,
        target: Target,
        profile: Profile,
        *,
        packed: bool = False,
        protocol: int = COMMON_PROTOCOL,
        slots: bool = False,
    ) -> None:
        self.protocol = protocol
        self.slots = slots
        self.ring_flags = 0
        self.log_addr = 0
        super().__init__(target, profile, packed=packed)

    def connect(self) -> None:
        """Open the connection and learn what is offered."""
        sock = self.target.connect()
        self.fe = FrontEnd(sock, self.target.options.answer_limit, self.target.first_limit)
        self.target.taps.append(self.fe.tap)
        self._offered = self.fe.get_u64(Request.GET_FEATURES)

    @property
    def offered(self) -> int:
        """The virtio feature bits offered, as a mask."""
        return self._offered & ~VHOST_BITS

    def negotiate(self, features: int) -> None:
        """Negotiate features and share memory.  Raise a finding if either is refused."""
        self.fe.negotiate(features, self.protocol)
        self.features = features
        if self.has_status:
            status = S(0)
            for step in (S.ACKNOWLEDGE, S.DRIVER, S.FEATURES_OK):
                status |= step
                self.fe.do(Request.SET_STATUS, VhostUserU64(u64=status).build())
        if self.slots:
            for region in self.ram.regions:
                if self.fe.add_region(region):
                    raise Finding(f"ADD_MEM_REG of {region.guest:#x} was refused")
        else:
            self.fe.set_memory(self.ram)

    def start_ring(self, index: int, ring: DriverRing, *, base: int | None = None) -> None:
        """Program a ring and start it."""
        self.rings[index] = ring
        self.kicks.setdefault(index, EventFd())
        self.calls.setdefault(index, EventFd())
        self.program(index, ring, base)
        self.fe.vring_fd(Request.SET_VRING_CALL, index, self.calls[index].fd)
        self.fe.vring_fd(Request.SET_VRING_KICK, index, self.kicks[index].fd)
        if self.fe.features & VhostFeature.PROTOCOL_FEATURES:
            self.fe.vring(Request.SET_VRING_ENABLE, index, 1)

    def program(self, index: int, ring: DriverRing, base: int | None = None) -> None:
        """Send size, base and addresses of a ring."""
        if base is None:
            base = self.start_base(ring)
        self.fe.vring(Request.SET_VRING_NUM, index, ring.size)
        self.fe.vring(Request.SET_VRING_BASE, index, base)
        self.fe.vring_addr(index, ring.areas, self.ram, flags=self.ring_flags, log=self.log_addr)

    @staticmethod
    def start_base(ring: DriverRing) -> int:
        """Return the base of a new ring; a packed one has both indices with wrap counters."""
        return ring.base | ring.base << 16 if ring.packed else ring.base

    def driver_ok(self) -> None:
        """Send SET_STATUS with DRIVER_OK, if the back-end has the device status."""
        if self.fe.protocol & P.STATUS:
            self.fe.do(Request.SET_STATUS, VhostUserU64(u64=READY).build())

    @property
    def has_status(self) -> bool:
        """Whether the back-end has the device status (protocol feature STATUS)."""
        return bool(self.fe.protocol & P.STATUS)

    def kick(self, index: int) -> None:
        """Notify the device."""
        self.kicks[index].signal()

    def stop_ring(self, index: int) -> int:
        """Send GET_VRING_BASE, which stops the ring, and return the base."""
        return self.fe.get_base(index)

    def check_base(self, index: int, base: int) -> None:
        """Check a reply to GET_VRING_BASE against the driver's position; all buffers are back."""
        ring = self.rings[index]
        due = ring.base
        got = base & 0xFFFF
        if got != due:
            raise Finding(f"GET_VRING_BASE answers {base:#x}, expected is {due:#x}")
        if ring.packed and base >> 16 != due:
            raise Finding(f"used half of the base is {base >> 16:#x}, expected is {due:#x}")

    def need_protocol(self, bit: ProtocolFeature) -> None:
        """Skip the test as not applicable unless a protocol feature is offered."""
        if not self._offered & VhostFeature.PROTOCOL_FEATURES:
            not_applicable("protocol features are not offered")
        if not self.fe.get_u64(Request.GET_PROTOCOL_FEATURES) & bit:
            not_applicable(f"protocol feature {bit.name} is not offered")

    def need_protocol_early(self) -> None:
        """Accept protocol feature CONFIG before any virtio feature is negotiated."""
        self.need_protocol(P.CONFIG)
        word = VhostUserU64(u64=int(P.CONFIG)).build()
        self.fe.send(Request.SET_PROTOCOL_FEATURES, word)
        self.fe.protocol = P.CONFIG

    def try_ring(self, *, size: int = 16, bad_area: int = -1, shift: str = "") -> Picture:
        """Program ring 0 with impossible values and kick it; refusals and closing are allowed.

        Return the contents of memory before the back-end could access it.
        """
        ring = self.make_ring(16)
        self.rings[0] = ring
        users = [self.ram.user(area) for area in ring.areas]
        end = self.ram.regions[0]
        if bad_area >= 0:
            users[bad_area] = {
                "gap": 0x1234_0000_0000,
                "end": end.user + end.size - 8,
                "odd": users[bad_area] + 1,
                "top": (1 << 64) - 16,
            }[shift]
        addr = VhostVringAddr(
            index=0, flags=0, descriptor=users[0], available=users[1], used=users[2], log=0
        )
        kick = self.kicks[0] = EventFd()
        fe = self.fe
        assert isinstance(ring, SplitRing)
        ring.desc[0] = (self.ram.alloc(64, 64, 1), 8, 0, 0)
        ring.avail[1] = 1
        before = self.ram.picture()
        with contextlib.suppress(Closed):
            fe.attempt(Request.SET_VRING_NUM, VhostVringState(index=0, num=size).build())
            fe.attempt(Request.SET_VRING_BASE, VhostVringState(index=0, num=0).build())
            fe.attempt(Request.SET_VRING_ADDR, addr.build())
            fe.attempt(Request.SET_VRING_KICK, VhostUserU64(u64=0).build(), [kick.fd])
            fe.attempt(Request.SET_VRING_ENABLE, VhostVringState(index=0, num=1).build())
            kick.signal()
            time.sleep(0.05)
        return before

    def need_log(self) -> None:
        """Skip the test as not applicable unless dirty logging is offered."""
        self.need_protocol(P.LOG_SHMFD)
        if not self._offered & VhostFeature.LOG_ALL:
            not_applicable("LOG_ALL is not offered")

    def usable(self) -> bool:
        """Return whether the connection answers."""
        return self.fe.usable()

    def read_config(self, offset: int, size: int) -> bytes:
        """Return *size* bytes of the device configuration."""
        if not self.fe.protocol & P.CONFIG:
            not_applicable("protocol feature CONFIG is not offered")
        return self.fe.get_config(offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Write device configuration."""
        if not self.fe.protocol & P.CONFIG:
            not_applicable("protocol feature CONFIG is not offered")
        self.fe.set_config(offset, data)

    def reset_features(self, features: int) -> None:
        """Send SET_FEATURES again while rings run."""
        self.fe.set_features(features | (self.fe.features & VhostFeature.PROTOCOL_FEATURES))

    def leave(self) -> None:
        """Close the connection."""
        self.fe.close()
