# SPDX-License-Identifier: Apache-2.0
"""A vfio-user client that acts like QEMU: it sends commands, answers DMA and checks replies.

The client drives a session without I/O directly.  Descriptors are passed as duplicates, as a socket
does it.  Its RAM answers DMA_READ and DMA_WRITE in either of the two layouts that clients use
(``vfio_user.remote`` explains why there are two).
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tests.fakes.memory import memfd

from vfio_user import PciDevice, Session, SessionLimits
from virtio_formats.vfio_user import (
    Capabilities,
    Command,
    DmaAccess,
    DmaAccess32,
    DmaMap,
    DmaUnmap,
    Header,
    HeaderFlags,
    IrqSet,
    IrqSetFlags,
    PciRegion,
    RegionAccess,
    Version,
)

QEMU_VERSION_DATA = (
    b'{"capabilities": {"max_msg_fds": 16, "max_data_xfer_size": 1048576, "pgsizes": 4096, '
    b'"max_dma_maps": 65535, "migration": {"pgsize": 4096, "max_bitmap_size": 268435456}, '
    b'"write_multiple": true}}\0'
)
"""The proposal of QEMU 11.1, except for order and spaces."""


class Ram:
    """Client memory at one DMA address, in a memfd, so that it can be mapped or not."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.fd = memfd(size)
        self.bytes = mmap.mmap(self.fd, size)

    def holds(self, address: int, count: int) -> bool:
        return self.address <= address and address + count <= self.address + self.size

    def read(self, address: int, count: int) -> bytes:
        offset = address - self.address
        return self.bytes[offset : offset + count]

    def write(self, address: int, data: bytes) -> None:
        offset = address - self.address
        self.bytes[offset : offset + len(data)] = data

    def close(self) -> None:
        self.bytes.close()
        os.close(self.fd)


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
        return bool(self.flags & HeaderFlags.ERROR)


def message(
    command: int, payload: bytes = b"", *, msg_id: int = 1, flags: int = 0, error: int = 0
) -> bytes:
    """Return the bytes of one message."""
    size = Header.SIZE + len(payload)
    head = Header(id=msg_id, command=command, size=size, flags=flags, error=error)
    return head.build() + payload


def split(data: bytes) -> tuple[Header, bytes]:
    """Return one message split into header and payload."""
    head = Header.parse(data[: Header.SIZE])
    assert head.size == len(data)
    return head, data[Header.SIZE :]


class FakeClient:
    """One connection to *device*.  ``ram`` is the memory that DMA messages reach."""

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
        """Called before a DMA message is answered."""
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
            head, payload = split(data)
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
        """Send a command, run the deferred work of the device, and check the errno of the reply."""
        self._id = (self._id + 1) & 0xFFFF
        self.send(message(command, payload, msg_id=self._id), fds)
        reply = self.inbox.pop()
        assert (reply.id, reply.command) == (self._id, command)
        assert reply.flags & HeaderFlags.TYPE_MASK == HeaderFlags.TYPE_REPLY
        assert reply.error == expect, os.strerror(reply.error)
        assert reply.failed == bool(expect)
        assert not (expect and reply.payload), "an error reply has a payload"
        if run:
            self.run()
        return reply

    def post(self, command: int, payload: bytes) -> None:
        """Send a command without a reply."""
        self.send(message(command, payload, flags=HeaderFlags.NO_REPLY))
        assert not self.inbox, "a reply to a command with NO_REPLY"
        self.run()

    def run(self) -> None:
        """Run the deferred work of the device until none is left."""
        for _ in range(100):
            self.session.device.run_deferred()
            self.session.drain()
            self._collect()
            if not self.session.device.has_work:
                return
        raise AssertionError("deferred work without end")

    # -- server commands --------------------------------------------------------------------------

    def _wait(self, done: Callable[[], bool]) -> None:
        for _ in range(64):
            if done():
                return
            requests, feed = self.session.take_output(), self.session.feed
            if not requests:
                requests, feed = self.session.take_twin_output(), self.session.feed_twin
            for data, fds in requests:
                head, payload = split(data)
                if head.flags & HeaderFlags.TYPE_MASK == HeaderFlags.TYPE_REPLY:
                    self.inbox.append(
                        Reply(head.id, head.command, head.flags, head.error, payload, fds)
                    )
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
        layout = DmaAccess32 if self.narrow else DmaAccess
        request = layout.parse(payload[: layout.SIZE])
        self.dma_sizes.append(request.count)
        ram = [r for r in self.ram if r.holds(request.address, request.count)]
        refused = self.refuse_reads and head.command == Command.DMA_READ
        if self.dma_error or refused or not ram:
            failed = HeaderFlags.TYPE_REPLY | HeaderFlags.ERROR
            error = self.dma_error or errno.EFAULT
            return message(head.command, msg_id=head.id, flags=failed, error=error)
        if head.command == Command.DMA_READ:
            data = ram[0].read(request.address, request.count)
            answer = payload[: layout.SIZE] + data + bytes(DmaAccess.SIZE - layout.SIZE)
        else:
            data = payload[layout.SIZE :][: request.count]
            assert len(data) == request.count
            ram[0].write(request.address, data)
            answer = b"" if self.narrow else payload[: DmaAccess.SIZE]
        return message(head.command, answer, msg_id=head.id, flags=HeaderFlags.TYPE_REPLY)

    # -- the commands -----------------------------------------------------------------------------

    def negotiate(self, data: bytes = QEMU_VERSION_DATA) -> Capabilities:
        """Send VERSION and return the capabilities of the server."""
        reply = self.call(Command.VERSION, Version(major=0, minor=0).build() + data)
        assert not data or len(reply.payload) <= len(data) + Version.SIZE
        return Capabilities.parse(reply.payload[Version.SIZE :])

    def map(
        self, ram: Ram, *, mapped: bool = True, flags: int = 3, expect: int = 0, offset: int = 0
    ) -> None:
        """Send DMA_MAP of *ram*, with its descriptor or without."""
        request = DmaMap(
            argsz=DmaMap.SIZE,
            flags=flags,
            offset=offset if mapped else 0,
            address=ram.address,
            size=ram.size - offset,
        )
        self.call(Command.DMA_MAP, request.build(), [ram.fd] if mapped else [], expect=expect)
        if not expect:
            self.ram.append(ram)

    def unmap(self, address: int, size: int, *, flags: int = 0, expect: int = 0) -> None:
        """Send DMA_UNMAP."""
        request = DmaUnmap(argsz=DmaUnmap.SIZE, flags=flags, address=address, size=size)
        reply = self.call(Command.DMA_UNMAP, request.build(), expect=expect)
        assert expect or reply.payload == request.build()

    def read(self, region: int, offset: int, count: int, *, expect: int = 0) -> bytes:
        """Send REGION_READ and return the data."""
        request = RegionAccess(offset=offset, region=region, count=count).build()
        reply = self.call(Command.REGION_READ, request, expect=expect)
        assert expect or reply.payload[: RegionAccess.SIZE] == request
        return reply.payload[RegionAccess.SIZE :]

    def write(
        self, region: int, offset: int, data: bytes, *, expect: int = 0, post: bool = False
    ) -> None:
        """Send REGION_WRITE, with a reply or, like QEMU, without."""
        request = RegionAccess(offset=offset, region=region, count=len(data)).build()
        if post:
            self.post(Command.REGION_WRITE, request + data)
            return
        reply = self.call(Command.REGION_WRITE, request + data, expect=expect)
        assert expect or reply.payload == request

    def config(self, offset: int, count: int) -> int:
        """Return a register of the configuration space."""
        return int.from_bytes(self.read(PciRegion.CONFIG, offset, count), "little")

    def set_config(self, offset: int, value: int, count: int) -> None:
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
        """Send DEVICE_SET_IRQS."""
        request = IrqSet(
            argsz=IrqSet.SIZE + len(data) if argsz is None else argsz,
            flags=flags,
            index=index,
            start=start,
            count=count,
        )
        self.call(Command.DEVICE_SET_IRQS, request.build() + data, fds, expect=expect)

    def assign(self, index: int, fds: Sequence[int], *, start: int = 0) -> None:
        """Assign eventfds to vectors."""
        flags = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
        self.set_irqs(index, flags, start=start, count=len(fds), fds=fds)

    def close(self) -> None:
        """Close the connection."""
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
