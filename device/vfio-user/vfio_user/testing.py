# SPDX-License-Identifier: Apache-2.0
"""A client in the same process, without a socket: for testing one's own device.

:class:`LocalClient` plays the client that QEMU is.  It drives a sans-IO session directly, so that
a test has neither threads nor time-outs.  Descriptors are handed over as duplicates, the way a
socket does it.  Its memory answers DMA_READ and DMA_WRITE in either of the two layouts that
clients use (:mod:`vfio_user.remote` says why there are two).

::

    client = LocalClient(Counter())
    client.negotiate()
    assert client.read(PciRegion.BAR0, 0, 1) == b"\\1"
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from vfio_user import requests
from vfio_user.device import PciDevice
from vfio_user.link import SessionLimits
from vfio_user.ram import Ram, answer_dma, message
from vfio_user.session import Session
from virtio_formats.vfio_user import (
    Capabilities,
    Command,
    DmaUnmap,
    Header,
    HeaderFlags,
    PciRegion,
    RegionAccess,
    Version,
)

__all__ = (
    "QEMU_VERSION_DATA",
    "LocalClient",
    "Ram",
    "Reply",
    "UnexpectedReply",
    "events",
    "message",
    "split",
)

QEMU_VERSION_DATA = (
    b'{"capabilities": {"max_msg_fds": 16, "max_data_xfer_size": 1048576, "pgsizes": 4096, '
    b'"max_dma_maps": 65535, "migration": {"pgsize": 4096, "max_bitmap_size": 268435456}, '
    b'"write_multiple": true}}\0'
)
"""What QEMU 11.1 proposes (order and spaces aside)."""

T = TypeVar("T")


class UnexpectedReply(AssertionError):
    """The server answered otherwise than the test expects."""


@dataclass
class Reply:
    """A message from the server."""

    id: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Return whether it is an error reply."""
        return bool(self.flags & HeaderFlags.ERROR)


def split(data: bytes) -> tuple[Header, bytes]:
    """Return the header and the payload of one message."""
    head = Header.parse(data[: Header.SIZE])
    _expect(head.size == len(data), f"a message of {len(data)} bytes that says {head.size}")
    return head, data[Header.SIZE :]


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UnexpectedReply(otherwise)


class LocalClient:
    """One connection to *device*.  ``ram`` is what DMA messages reach.

    *expect* of a method is the errno that the reply must have; otherwise
    :class:`UnexpectedReply` is raised.
    """

    def __init__(
        self,
        device: PciDevice,
        *,
        limits: SessionLimits | None = None,
        narrow: bool = False,
        twin: bool = False,
    ) -> None:
        self.ram: list[Ram] = []
        self.narrow = narrow
        self.dma_error = 0
        """An errno with which every DMA message is refused."""
        self.dma_sizes: list[int] = []
        self.refuse_reads = False
        """Refuse every DMA_READ: memory that the device may only write."""
        self.before_dma: Callable[[], None] | None = None
        """Called before a DMA message is answered: what the client does meanwhile."""
        self.silent = False
        """Never answer a DMA message."""
        self.inbox: list[Reply] = []
        self.twin_fds: list[int] = []
        self._id = 0
        self.session = Session(
            device,
            limits=limits,
            wait=self._wait,
            open_twin=self._open_twin if twin else None,
        )

    def _open_twin(self) -> int:
        ours, theirs = os.pipe()
        self.twin_fds.append(ours)
        return theirs

    # -- messages ---------------------------------------------------------------------------------

    def send(self, data: bytes, fds: Iterable[int] = ()) -> None:
        """Send raw bytes, with duplicates of *fds*."""
        self.session.feed(data, [os.dup(fd) for fd in fds])
        self._collect()

    def _collect(self) -> None:
        for data, fds in self.session.take_output():
            self._take(*split(data), fds)

    def _take(self, head: Header, payload: bytes, fds: list[int]) -> None:
        self.inbox.append(Reply(head.id, head.command, head.flags, head.error, payload, fds))

    def call(
        self,
        command: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        expect: int = 0,
        run: bool = True,
    ) -> Reply:
        """Send a command and return its reply; then (*run*) do what the device has deferred."""
        self._id = (self._id + 1) & 0xFFFF
        self.send(message(command, payload, msg_id=self._id), fds)
        _expect(bool(self.inbox), f"no answer to command {command}")
        reply = self.inbox.pop()
        _expect((reply.id, reply.command) == (self._id, command), f"{reply} to command {command}")
        kind = reply.flags & HeaderFlags.TYPE_MASK
        _expect(kind == HeaderFlags.TYPE_REPLY, f"a message of type {kind}")
        _expect(reply.error == expect, f"errno {reply.error}, {os.strerror(reply.error)}")
        _expect(reply.failed == bool(expect), f"flags {reply.flags:#x}, errno {reply.error}")
        _expect(not (expect and reply.payload), "an error reply with a payload")
        if run:
            self.run()
        return reply

    def do(self, request: requests.Request[T], *, expect: int = 0) -> T | None:
        """Send a command of :mod:`vfio_user.requests`.

        Return what its reply says, None where the server refuses it as expected.
        """
        reply = self.call(request.command, request.payload, request.fds, expect=expect)
        return None if expect else request.parse(requests.Reply(reply.payload, tuple(reply.fds)))

    def post(self, command: int, payload: bytes) -> None:
        """Send a command that wants no reply."""
        self.send(message(command, payload, flags=HeaderFlags.NO_REPLY))
        _expect(not self.inbox, "an answer to a command that wanted none")
        self.run()

    def run(self) -> None:
        """Let the device do what it deferred, until there is nothing left."""
        for _ in range(100):
            self.session.device.run_deferred()
            self.session.drain()
            self._collect()
            if not self.session.device.has_work:
                return
        raise UnexpectedReply("deferred work without end")

    # -- server commands --------------------------------------------------------------------------

    def _wait(self, done: Callable[[], bool]) -> None:
        for _ in range(64):
            if done():
                return
            messages, feed = self.session.take_output(), self.session.feed
            if not messages:
                messages, feed = self.session.take_twin_output(), self.session.feed_twin
            for data, fds in messages:
                head, payload = split(data)
                if head.flags & HeaderFlags.TYPE_MASK == HeaderFlags.TYPE_REPLY:
                    self._take(head, payload, fds)
                    continue
                if self.before_dma is not None:
                    self.before_dma()
                if not self.silent:
                    feed(self._dma(head, payload), [])
        if not done() and self.session.blocked:
            self.session.cancel_work()  # the client waits for its own command
        if not done():
            raise TimeoutError

    def _dma(self, head: Header, payload: bytes) -> bytes:
        self.dma_sizes.append(int.from_bytes(payload[8:12], "little"))
        refused = self.refuse_reads and head.command == Command.DMA_READ
        error = self.dma_error or (errno.EACCES if refused else 0)
        return answer_dma(self.ram, head.command, head.id, payload, narrow=self.narrow, error=error)

    # -- the commands -----------------------------------------------------------------------------

    def negotiate(self, data: bytes = QEMU_VERSION_DATA) -> Capabilities:
        """Negotiate with the version data of QEMU, or with *data*; return the server's."""
        reply = self.call(Command.VERSION, Version(major=0, minor=0).build() + data)
        longer = len(reply.payload) > len(data) + Version.SIZE
        _expect(not (data and longer), "a VERSION reply that is longer than the request")
        return Capabilities.parse(reply.payload[Version.SIZE :])

    def map(
        self, ram: Ram, *, mapped: bool = True, flags: int = 3, expect: int = 0, offset: int = 0
    ) -> None:
        """Map *ram*, with its descriptor or (not *mapped*) without."""
        fd, at, size = (ram.fd, offset, ram.size - offset) if mapped else (None, 0, ram.size)
        self.do(requests.dma_map(ram.address, size, fd=fd, offset=at, flags=flags), expect=expect)
        if not expect:
            self.ram.append(ram)

    def unmap(self, address: int, size: int, *, flags: int = 0, expect: int = 0) -> None:
        """Unmap a range of client memory."""
        request = DmaUnmap(argsz=DmaUnmap.SIZE, flags=flags, address=address, size=size).build()
        reply = self.call(Command.DMA_UNMAP, request, expect=expect)
        _expect(bool(expect) or reply.payload == request, "a DMA_UNMAP reply unlike the request")

    def read(self, region: int, offset: int, count: int, *, expect: int = 0) -> bytes:
        """Return *count* bytes of a region."""
        request = RegionAccess(offset=offset, region=region, count=count).build()
        reply = self.call(Command.REGION_READ, request, expect=expect)
        same = reply.payload[: RegionAccess.SIZE] == request
        _expect(bool(expect) or same, "a REGION_READ reply of another range")
        return reply.payload[RegionAccess.SIZE :]

    def write(
        self, region: int, offset: int, data: bytes, *, expect: int = 0, post: bool = False
    ) -> None:
        """Write to a region, with a reply or (*post*, as QEMU does) without."""
        request = RegionAccess(offset=offset, region=region, count=len(data)).build()
        if post:
            self.post(Command.REGION_WRITE, request + data)
            return
        reply = self.call(Command.REGION_WRITE, request + data, expect=expect)
        _expect(bool(expect) or reply.payload == request, "a REGION_WRITE reply of another range")

    def config(self, offset: int, count: int) -> int:
        """Return a register of configuration space, *count* bytes at *offset*."""
        return int.from_bytes(self.read(PciRegion.CONFIG, offset, count), "little")

    def set_config(self, offset: int, value: int, count: int) -> None:
        """Write a register of configuration space."""
        self.write(PciRegion.CONFIG, offset, value.to_bytes(count, "little"))

    def set_irqs(
        self,
        index: int,
        flags: int,
        *,
        start: int = 0,
        count: int = 0,
        data: bytes = b"",
        fds: Sequence[int] = (),
        argsz: int | None = None,
        expect: int = 0,
    ) -> None:
        """Send DEVICE_SET_IRQS: see :func:`vfio_user.requests.set_irqs`."""
        request = requests.set_irqs(
            index, flags, start=start, count=count, data=data, fds=fds, argsz=argsz
        )
        self.do(request, expect=expect)

    def assign(self, index: int, fds: Sequence[int], *, start: int = 0) -> None:
        """Give eventfds to vectors, from vector *start* on."""
        self.do(requests.assign_irqs(index, fds, start=start))

    def close(self) -> None:
        """Disconnect."""
        self.session.receive_eof()
        for fd in self.twin_fds:
            os.close(fd)
        self.twin_fds.clear()


def events(fd: int) -> int:
    """Return how often a non-blocking eventfd was signalled since the last call."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
