# SPDX-License-Identifier: Apache-2.0
"""A vhost-user front-end that acts like QEMU: memory in a memfd, every message, its own rings.

It blocks, with a timeout on every operation.  It follows vhost-user.rst (QEMU 11.1.3) with the wire
formats of ``spec/``, and shares no code with the back-end.
"""

from __future__ import annotations

import array
import os
import select
import socket
import time
from dataclasses import dataclass

from tests.fakes.driver import DriverRing, Element, make_driver
from tests.fakes.memory import Arena, make_memory

import virtio_formats.vhost_user as vu
from vballoon.memory import GuestMemory
from virtio_formats.vhost_user import ProtocolFeature as P
from virtio_formats.vhost_user import Request
from virtio_formats.virtio import features as f

R = Request
TIMEOUT = 10.0
F_PROTOCOL = int(vu.VhostFeature.PROTOCOL_FEATURES)
F_LOG_ALL = int(vu.VhostFeature.LOG_ALL)


class Closed(Exception):
    """The back-end closed the connection."""


@dataclass
class Ring:
    """A ring of this front-end: the driver, and the event descriptors."""

    index: int
    driver: DriverRing
    kick_fd: int
    call_fd: int
    err_fd: int = -1

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    def submit(self, data: bytes, room: int = 0, *, indirect: bool = False) -> int:
        """Make a buffer available, *data* to read and *room* bytes to write, and return its id."""
        elements = [self.driver.buffer(len(data))]
        self.driver.memory.write(elements[0].addr, data)
        if room:
            elements.append(Element(self.driver.arena.take(room), room, True))
        ident = self.driver.add(*elements, indirect=indirect)
        self.driver.publish()
        return ident

    def called(self, timeout: float = 0.0) -> int:
        """Return the number of pending notifications, 0 if none arrives in time."""
        if not select.select([self.call_fd], [], [], timeout)[0]:
            return 0
        return os.eventfd_read(self.call_fd)

    def collect(self, count: int, timeout: float = TIMEOUT) -> list[tuple[int, int]]:
        """Wait for *count* used buffers and return them as (id, written)."""
        done: list[tuple[int, int]] = []
        end = time.monotonic() + timeout
        while True:
            done += self.driver.collect()
            if len(done) >= count:
                return done
            assert time.monotonic() < end, f"{len(done)} of {count} buffers came back"
            self.called(0.02)

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            if fd >= 0:
                os.close(fd)


class Frontend:
    """One connection.  *sock* is connected to the back-end, and taken over."""

    def __init__(self, sock: socket.socket, memory: GuestMemory | None = None) -> None:
        self.sock = sock
        sock.settimeout(TIMEOUT)
        self.memory = memory or make_memory()
        self._own_memory = None if memory else self.memory
        self.arena = Arena(0x10000, self.memory.regions[0].size - 0x10000)
        self.features = self.protocol = 0
        self.rings: dict[int, Ring] = {}
        self.channel: socket.socket | None = None

    @classmethod
    def connect(cls, path, memory: GuestMemory | None = None) -> Frontend:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(path))
        return cls(sock, memory)

    def __enter__(self) -> Frontend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()
        for ring in self.rings.values():
            ring.close()
        self.rings.clear()
        if self.channel is not None:
            self.channel.close()
        if self._own_memory is not None:
            self._own_memory.close()

    # -- messages -----------------------------------------------------------------------------

    def send_raw(self, data: bytes, fds: list[int] | tuple[int, ...] = ()) -> None:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.sock.sendmsg([data], control)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error

    def send(self, request: int, payload: bytes = b"", fds=(), *, need_reply: bool = False) -> None:
        flags = vu.VERSION | (vu.HeaderFlag.NEED_REPLY if need_reply else 0)
        head = vu.VhostUserHeader(request=request, flags=flags, size=len(payload)).build()
        self.send_raw(head + payload, fds)

    def receive(self, request: int) -> bytes:
        """Return the payload of the reply to *request*; store descriptors in :attr:`reply_fds`."""
        self.reply_fds: list[int] = []
        head = vu.VhostUserHeader.parse(self._read(12))
        assert head.request == request, f"reply to {head.request}, expected {request}"
        assert head.flags == vu.VERSION | vu.HeaderFlag.REPLY
        return self._read(head.size)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part, fds, _, _ = socket.recv_fds(self.sock, size - len(data), 16)
            except ConnectionResetError as error:
                raise Closed from error
            self.reply_fds += fds
            if not part:
                raise Closed
            data += part
        return data

    def call(self, request: int, payload: bytes = b"", fds=()) -> bytes:
        """Send a request and return its reply."""
        self.send(request, payload, fds)
        return self.receive(request)

    def get_u64(self, request: int, payload: bytes = b"", fds=()) -> int:
        return vu.VhostUserU64.parse(self.call(request, payload, fds)).u64

    def ack(self, request: int, payload: bytes = b"", fds=()) -> int:
        """Send a request with NEED_REPLY and return the acknowledgement."""
        self.send(request, payload, fds, need_reply=True)
        return vu.VhostUserU64.parse(self.receive(request)).u64

    def ok(self, request: int, payload: bytes = b"", fds=()) -> None:
        """Send a request and check that it succeeded, by its acknowledgement if negotiated."""
        if self.protocol & P.REPLY_ACK:
            assert self.ack(request, payload, fds) == 0, f"{R(request).name} failed"
        else:
            self.send(request, payload, fds)

    def u64(self, value: int) -> bytes:
        return vu.VhostUserU64(u64=value).build()

    def state(self, index: int, num: int) -> bytes:
        return vu.VhostVringState(index=index, num=num).build()

    def expect_close(self, timeout: float = TIMEOUT) -> None:
        """Check that the back-end closes the connection without a reply."""
        self.sock.settimeout(timeout)
        try:
            data = self.sock.recv(1)
        except ConnectionResetError:
            return
        assert data == b"", "a reply instead of a closed connection"

    # -- the usual sequence -------------------------------------------------------------------

    def negotiate(self, wanted: int | None = None, protocol: int | None = None) -> None:
        """Negotiate features and protocol features like QEMU; None takes everything offered."""
        offered = self.get_u64(R.GET_FEATURES)
        self.features = offered & ~F_LOG_ALL if wanted is None else wanted
        if self.features & F_PROTOCOL:
            every = self.get_u64(R.GET_PROTOCOL_FEATURES)
            self.protocol = every if protocol is None else protocol
            self.send(R.SET_PROTOCOL_FEATURES, self.u64(self.protocol))
        self.send(R.SET_OWNER)
        self.ok(R.SET_FEATURES, self.u64(self.features))

    def region(
        self, number: int = 0, memory: GuestMemory | None = None
    ) -> vu.VhostUserMemoryRegion:
        r = (memory or self.memory).regions[number]
        return vu.VhostUserMemoryRegion(
            guest_address=r.guest_phys_addr,
            size=r.size,
            user_address=r.userspace_addr,
            mmap_offset=r.file_offset,
        )

    def slot(self, number: int = 0) -> bytes:
        return bytes(8) + self.region(number).build()

    def share_memory(self) -> None:
        """Send every region, by ADD_MEM_REG if negotiated, else in one table."""
        regions = self.memory.regions
        if self.protocol & P.CONFIGURE_MEM_SLOTS:
            for i, r in enumerate(regions):
                self.ok(R.ADD_MEM_REG, self.slot(i), [r.fd])
            return
        table = vu.VhostUserMemory.of([self.region(i) for i in range(len(regions))])
        self.ok(R.SET_MEM_TABLE, table.build(), [r.fd for r in regions])

    def user(self, addr: int) -> int:
        """Return the front-end's virtual address of guest-physical *addr*."""
        for r in self.memory.regions:
            if 0 <= addr - r.guest_phys_addr < r.size:
                return addr - r.guest_phys_addr + r.userspace_addr
        raise AssertionError(f"{addr:#x} is not guest memory")

    def addr_message(self, ring: Ring, *, log: int | None = None) -> bytes:
        a = ring.driver.addresses
        return vu.VhostVringAddr(
            index=ring.index,
            flags=0 if log is None else int(vu.VringFlag.LOG),
            descriptor=self.user(a.desc),
            used=self.user(a.device),
            available=self.user(a.driver),
            log=log or 0,
        ).build()

    def make_ring(self, index: int = 0, size: int = 16) -> Ring:
        """Return a ring in guest memory that is not yet sent to the back-end."""
        driver = make_driver(self.memory, size, self.features, arena=self.arena)
        ring = Ring(
            index,
            driver,
            os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),
            os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),
            os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),
        )
        self.rings[index] = ring
        return ring

    def start_ring(self, ring: Ring, base: int | None = None, *, enable: bool = True) -> None:
        """Send NUM, BASE, ADDR, KICK, CALL, ERR, ENABLE, in QEMU's order."""
        i = ring.index
        packed = f.has(self.features, f.VIRTIO_F_RING_PACKED)
        if base is None:
            base = 0x80008000 if packed else 0
        self.ok(R.SET_VRING_NUM, self.state(i, ring.driver.size))
        self.ok(R.SET_VRING_BASE, self.state(i, base))
        self.ok(R.SET_VRING_ADDR, self.addr_message(ring))
        self.ok(R.SET_VRING_KICK, self.u64(i), [ring.kick_fd])
        self.ok(R.SET_VRING_CALL, self.u64(i), [ring.call_fd])
        if ring.err_fd >= 0:
            self.ok(R.SET_VRING_ERR, self.u64(i), [ring.err_fd])
        if enable and self.features & F_PROTOCOL:
            self.ok(R.SET_VRING_ENABLE, self.state(i, 1))

    def new_ring(self, index: int = 0, size: int = 16, **kwargs) -> Ring:
        """Make and start a ring."""
        ring = self.make_ring(index, size)
        self.start_ring(ring, **kwargs)
        return ring

    def stop_ring(self, ring: Ring) -> int:
        """Send GET_VRING_BASE and return the index in the reply."""
        reply = self.call(R.GET_VRING_BASE, self.state(ring.index, 0))
        told = vu.VhostVringState.parse(reply)
        assert told.index == ring.index
        return told.num

    def status_ok(self) -> None:
        """Set the device status up to DRIVER_OK, if STATUS is negotiated."""
        if self.protocol & P.STATUS:
            self.ok(R.SET_STATUS, self.u64(15))

    def open_channel(self) -> socket.socket:
        """Send SET_BACKEND_REQ_FD and return this end of the channel."""
        ours, theirs = socket.socketpair()
        self.ok(R.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        theirs.close()
        ours.settimeout(TIMEOUT)
        self.channel = ours
        return ours

    def up(self, *rings: int, size: int = 16, **negotiate) -> list[Ring]:
        """Negotiate, share memory and start the rings."""
        self.negotiate(**negotiate)
        self.share_memory()
        made = [self.new_ring(i, size) for i in rings or (0,)]
        self.status_ok()
        return made
