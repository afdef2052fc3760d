# SPDX-License-Identifier: Apache-2.0
"""``vfio_user.server`` and ``run`` on real sockets, with a client in a separate thread.

Labels: vfio-user specification (QEMU 11.1), *Client/server interactions* and ``Backend Program
Conventions``.
"""

from __future__ import annotations

import array
import asyncio
import errno
import gc
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gadget import Gadget
from helpers import open_fds

import fdsocket
from vfio_user import DmaError, PciDevice, RequestError, Server, server
from vfio_user.testing import QEMU_VERSION_DATA, Ram, message
from virtio_formats.vfio_user import (
    Capabilities,
    Command,
    DeviceFeature,
    DeviceState,
    DmaAccess,
    DmaMap,
    DmaUnmap,
    Feature,
    FeatureFlags,
    Header,
    HeaderFlags,
    IrqSet,
    IrqSetFlags,
    MigState,
    PciIrq,
    RegionAccess,
    RegionIoFds,
    Version,
)

REPLY = HeaderFlags.TYPE_REPLY


class Wire:
    """A blocking client on a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(10)
        self.number = 0
        self.version = b""
        self.fds: list[int] = []

    @classmethod
    def connect(cls, path: Path, data: bytes = QEMU_VERSION_DATA) -> Wire:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        wire = cls(sock)
        wire.version, wire.fds = wire.call(
            Command.VERSION, Version(major=0, minor=0).build() + data
        )
        return wire

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], rights)

    def receive(self) -> tuple[Header, bytes, list[int]]:
        raw, fds, _, _ = socket.recv_fds(self.sock, Header.SIZE, 16)
        if not raw:
            raise EOFError
        head = Header.parse(raw)
        payload = b""
        while len(payload) < head.size - Header.SIZE:
            payload += self.sock.recv(head.size - Header.SIZE - len(payload))
        return head, payload, fds

    def call(
        self, command: int, payload: bytes = b"", fds: list[int] | None = None
    ) -> tuple[bytes, list[int]]:
        self.number += 1
        self.send(message(command, payload, msg_id=self.number), fds)
        head, answer, got = self.receive()
        assert (head.id, head.command, head.error) == (self.number, command, 0)
        return answer, got

    def map(self, ram: Ram, fds: list[int] | None = None) -> None:
        request = DmaMap(argsz=32, flags=3, offset=0, address=ram.address, size=ram.size)
        self.call(Command.DMA_MAP, request.build(), fds)

    def answer_dma(self, ram: Ram) -> None:
        """Answer one DMA_READ."""
        head, payload, _ = self.receive()
        request = DmaAccess.parse(payload)
        data = ram.read(request.address, request.count)
        self.send(message(head.command, payload + data, msg_id=head.id, flags=REPLY))

    def close(self) -> None:
        self.sock.close()


def serve(device: PciDevice, path: Path, client: Callable[[], None]) -> None:
    """Run a server in the loop, and *client* in a thread until it returns."""

    async def main() -> None:
        running = Server(device, fdsocket.listen(path))
        serving = asyncio.create_task(running.serve())
        await asyncio.sleep(0)
        try:
            await asyncio.wait_for(asyncio.to_thread(client), 20)
        finally:
            running.close()
            await serving

    asyncio.run(main())


@pytest.fixture
def gadget() -> Iterator[Gadget]:
    device = Gadget()
    yield device
    device.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "dev.sock"


def test_clients_one_after_another(gadget: Gadget, path: Path) -> None:
    """A second client is refused at once; the next one finds the device unchanged."""
    request = RegionAccess(offset=4, region=0, count=4).build()
    before = open_fds()

    def client() -> None:
        ram = Ram(0x10000, 0x10000)
        first = Wire.connect(path)
        first.map(ram, [ram.fd])
        first.call(Command.REGION_WRITE, request + b"left")
        refused = Wire(socket.socket(socket.AF_UNIX))
        refused.sock.connect(str(path))
        refused.send(message(Command.VERSION, Version(major=0, minor=0).build(), msg_id=77))
        head = refused.receive()[0]
        assert (head.id, head.command, head.error) == (77, Command.VERSION, errno.EBUSY)
        with pytest.raises(EOFError):
            refused.receive()
        refused.close()
        first.close()
        second = Wire.connect(path)  # the end of the first may not be noticed yet
        assert second.call(Command.REGION_READ, request)[0][16:] == b"left"
        second.close()
        ram.close()

    serve(gadget, path, client)
    assert gadget.dma.regions == []
    assert open_fds() == before


@pytest.mark.parametrize(
    "last_words",
    [
        b"",
        b"\1",
        message(Command.DMA_MAP, bytes(32))[:20],
        message(Command.VERSION, b""),
        message(Command.DEVICE_GET_INFO, bytes(16)),
        Header(id=1, command=1, size=3, flags=0, error=0).build(),
        b"\xff" * 4096,
    ],
)
def test_a_client_that_disappears(gadget: Gadget, path: Path, last_words: bytes) -> None:
    before = open_fds()

    def client() -> None:
        rude = Wire.connect(path)
        fd = os.eventfd(0)
        if last_words:
            rude.send(last_words, [fd])
        rude.close()
        os.close(fd)
        Wire.connect(path).close()

    serve(gadget, path, client)
    assert gadget.log.count(("attached",)) == gadget.log.count(("detached",)) == 2
    assert open_fds() == before


def test_a_protocol_violation_is_answered_and_the_connection_closed(
    gadget: Gadget, path: Path
) -> None:
    def client() -> None:
        wire = Wire.connect(path)
        wire.send(Header(id=77, command=1, size=3, flags=0, error=0).build())
        head, _, _ = wire.receive()
        assert (head.id, head.error) == (77, errno.EINVAL)
        with pytest.raises(EOFError):
            wire.receive()
        wire.close()

    serve(gadget, path, client)


def test_posted_writes_are_done_before_a_read_is_answered(gadget: Gadget, path: Path) -> None:
    def client() -> None:
        wire = Wire.connect(path)
        for number in range(100):
            request = RegionAccess(offset=number * 2, region=0, count=2).build()
            payload = request + number.to_bytes(2, "little")
            wire.send(message(Command.REGION_WRITE, payload, flags=HeaderFlags.NO_REPLY))
        answer, _ = wire.call(
            Command.REGION_READ, RegionAccess(offset=0, region=0, count=200).build()
        )
        assert answer[16:] == b"".join(n.to_bytes(2, "little") for n in range(100))
        wire.close()

    serve(gadget, path, client)


class TestDmaByMessage:
    """The server's own commands, with the client busy or gone."""

    def doorbell(self, gadget: Gadget) -> list[object]:
        """Make BAR 0 a doorbell that has the device read client memory."""
        seen: list[object] = []

        def work() -> None:
            try:
                seen.append(gadget.dma.read(0x10000, 4))
            except DmaError as error:
                seen.append(error.errno)

        gadget.regions[0].write = lambda offset, data: gadget.defer(work)
        return seen

    def test_in_between_a_clients_own_command(self, gadget: Gadget, path: Path) -> None:
        """The client waits for its register before it answers the DMA message, as QEMU does."""
        seen = self.doorbell(gadget)
        request = RegionAccess(offset=0, region=0, count=4).build()

        def client() -> None:
            ram = Ram(0x10000, 0x10000)
            ram.write(0x10000, b"dma!")
            wire = Wire.connect(path)
            wire.map(ram)
            flags = HeaderFlags.NO_REPLY
            wire.send(message(Command.REGION_WRITE, request + b"ring", flags=flags))
            head, payload, _ = wire.receive()
            assert head.command == Command.DMA_READ
            wire.send(message(Command.REGION_READ, request, msg_id=500))
            assert wire.receive()[0].id == 500, "deadlock: the read waits for the DMA"
            wire.send(message(head.command, payload + b"dma!", msg_id=head.id, flags=REPLY))
            wire.call(Command.REGION_READ, request)
            wire.close()
            ram.close()

        serve(gadget, path, client)
        assert seen == [b"dma!"]

    def test_the_client_goes_instead_of_answering(self, gadget: Gadget, path: Path) -> None:
        seen = self.doorbell(gadget)
        before = open_fds()

        def client() -> None:
            ram = Ram(0x10000, 0x10000)
            wire = Wire.connect(path)
            wire.map(ram)
            wire.call(
                Command.REGION_WRITE, RegionAccess(offset=0, region=0, count=4).build() + b"ring"
            )
            wire.receive()
            wire.close()
            ram.close()
            Wire.connect(path).close()

        serve(gadget, path, client)
        assert seen == [errno.ENOTCONN]
        assert open_fds() == before

    def test_no_answer_in_time(
        self, gadget: Gadget, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "DMA_TIMEOUT", 0.1)
        seen = self.doorbell(gadget)

        def client() -> None:
            ram = Ram(0x10000, 0x10000)
            wire = Wire.connect(path)
            wire.map(ram)
            wire.call(
                Command.REGION_WRITE, RegionAccess(offset=0, region=0, count=4).build() + b"ring"
            )
            head, payload, _ = wire.receive()
            time.sleep(0.3)
            wire.send(message(head.command, payload + b"late", msg_id=head.id, flags=REPLY))
            wire.call(Command.DEVICE_RESET)
            wire.close()
            ram.close()

        serve(gadget, path, client)
        assert seen == [errno.ETIMEDOUT]

    def test_over_a_twin_socket(self, gadget: Gadget, path: Path) -> None:
        seen = self.doorbell(gadget)
        wanted = b'{"capabilities":{"max_msg_fds":8,"twin_socket":{"supported":true}}}\0'

        def client() -> None:
            ram = Ram(0x10000, 0x10000)
            ram.write(0x10000, b"twin")
            wire = Wire.connect(path, wanted)
            caps = Capabilities.parse(wire.version[Version.SIZE :])
            assert (caps.twin_socket, caps.twin_socket_fd_index) == (True, 0)
            twin = Wire(socket.socket(fileno=wire.fds[0]))
            wire.map(ram)
            request = RegionAccess(offset=0, region=0, count=4).build()
            wire.call(Command.REGION_WRITE, request + b"ring")
            twin.answer_dma(ram)
            wire.call(Command.REGION_READ, request)
            twin.close()
            wire.close()
            ram.close()

        before = open_fds()
        serve(gadget, path, client)
        assert seen == [b"twin"]
        assert open_fds() == before


def test_a_doorbell_by_eventfd(gadget: Gadget, path: Path) -> None:
    def client() -> None:
        wire = Wire.connect(path)
        request = RegionIoFds(argsz=96, flags=0, index=0, count=0)
        _, fds = wire.call(Command.DEVICE_GET_REGION_IO_FDS, request.build())
        os.eventfd_write(fds[0], 1)
        deadline = time.monotonic() + 5
        while not gadget.log or gadget.log[-1] != ("kick", 8):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.close(fds[0])
        wire.close()

    serve(gadget, path, client)


def test_the_largest_transfers(gadget: Gadget, path: Path) -> None:
    """One MiB in a message in each direction, which is more than a socket buffers."""
    gadget.regions[0].size = 1 << 21
    gadget.regions[0].read = lambda offset, count: bytes(count)
    sizes: list[int] = []
    gadget.regions[0].write = lambda offset, data: sizes.append(len(data))

    def client() -> None:
        wire = Wire.connect(path)
        request = RegionAccess(offset=0, region=0, count=1 << 20).build()
        answer, _ = wire.call(Command.REGION_READ, request)
        assert len(answer) == 16 + (1 << 20)
        wire.number += 1
        wire.sock.sendall(message(Command.REGION_WRITE, request + bytes(1 << 20), msg_id=9))
        assert wire.receive()[0].id == 9
        wire.close()

    serve(gadget, path, client)
    assert sizes == [1 << 20]


def run(*args: str, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("program.py")), *args],
        stderr=subprocess.PIPE,
        **options,  # type: ignore[call-overload]
    )


class TestProgram:
    """``Backend Program Conventions``."""

    def test_on_a_path_until_sigterm(self, path: Path) -> None:
        with run("--socket-path", str(path)) as program:
            deadline = time.monotonic() + 20
            while not path.exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            Wire.connect(path).close()
            program.send_signal(signal.SIGTERM)
            assert program.wait(10) == 0
        assert not path.exists()

    def test_on_an_inherited_connection_until_it_ends(self) -> None:
        ours, theirs = socket.socketpair()
        with run("--fd", str(theirs.fileno()), pass_fds=[theirs.fileno()]) as program:
            theirs.close()
            wire = Wire(ours)
            wire.call(Command.VERSION, Version(major=0, minor=0).build())
            wire.close()
            assert program.wait(20) == 0

    @pytest.mark.parametrize(
        ("arguments", "status"),
        [(["--socket-path", "/nonexistent/dir/x.sock"], 1), (["--fd", "99"], 1), ([], 2)],
    )
    def test_what_cannot_be(self, arguments: list[str], status: int) -> None:
        with run(*arguments) as program:
            assert program.wait(20) == status
            assert program.stderr is not None
            assert b"Traceback" not in program.stderr.read()


def test_a_client_that_cannot_be_accepted_costs_no_cpu(
    gadget: Gadget, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    """Without a free descriptor there is one log line and a pause; then the client is served."""

    class Refusing(socket.socket):
        left = 2

        def accept(self):
            if self.left:
                self.left -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    async def main() -> None:
        listener = fdsocket.listen(tmp_path / "s")
        refusing = Refusing(fileno=listener.detach())
        refusing.setblocking(False)
        running = Server(gadget, refusing)
        serving = asyncio.create_task(running.serve())
        wire = await asyncio.wait_for(asyncio.to_thread(Wire.connect, tmp_path / "s"), 10)
        wire.close()
        running.close()
        await serving

    monkeypatch.setattr(fdsocket.Acceptor, "retry_seconds", 0.05)
    asyncio.run(main())
    assert caplog.text.count("cannot accept a client") == 2


def test_a_client_that_reconnects_is_never_refused(gadget: Gadget, path: Path) -> None:
    """The old connection has ended, but the server may notice the new one first."""

    def client() -> None:
        for number in range(50):
            wire = Wire.connect(path)
            if number % 2:  # leave something unread, and an answer that nobody takes
                wire.send(message(Command.DEVICE_GET_INFO, bytes(16)) * 20)
            wire.close()

    serve(gadget, path, client)
    assert gadget.log.count(("attached",)) == gadget.log.count(("detached",)) == 50


def test_a_connection_that_outlives_its_process_for_a_moment(
    gadget: Gadget, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU has ended, but io_uring still holds its socket; then it is let go."""
    monkeypatch.setattr("vfio_user.server.GRACE", 15.0)

    def client() -> None:
        first = Wire.connect(path)
        held = first.sock.dup()
        first.close()
        second = Wire(socket.socket(socket.AF_UNIX))
        second.sock.connect(str(path))
        data = Version(major=0, minor=0).build() + QEMU_VERSION_DATA
        second.send(message(Command.VERSION, data, msg_id=5))
        third = Wire(socket.socket(socket.AF_UNIX))  # only one is held
        third.sock.connect(str(path))
        third.send(message(Command.VERSION, data, msg_id=6))
        assert third.receive()[0].error == errno.EBUSY
        held.close()
        head = second.receive()[0]
        assert (head.id, head.error) == (5, 0)
        second.close()
        third.close()

    serve(gadget, path, client)


def test_clients_that_are_refused_are_bounded(gadget: Gadget, path: Path) -> None:
    before = open_fds()

    def client() -> None:
        first = Wire.connect(path)
        silent = [socket.socket(socket.AF_UNIX) for _ in range(40)]
        for sock in silent:
            sock.connect(str(path))
            first.call(Command.DEVICE_RESET)
        assert open_fds() - before < 40 + 16 + 10
        for sock in silent:
            sock.close()
        first.close()

    serve(gadget, path, client)


def test_a_device_that_fails_at_the_end_of_a_client(gadget: Gadget, path: Path) -> None:
    """The server once stopped watching its listening socket."""

    def fail(*args: object) -> None:
        raise ZeroDivisionError("in a hook")

    gadget.detached = fail  # type: ignore[method-assign]
    gadget.dma.on_unmap = fail
    before = open_fds()

    def client() -> None:
        for _ in range(3):
            wire = Wire.connect(path)
            for address in (0x10000, 0x40000):
                ram = Ram(address, 0x10000)
                wire.map(ram, [ram.fd])
                ram.close()
            wire.close()

    serve(gadget, path, client)
    assert gadget.dma.regions == []
    gc.collect()
    assert open_fds() == before


def test_intx_over_a_socket_is_unmasked_by_an_eventfd(gadget: Gadget, path: Path) -> None:
    raised, unmask = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
    gadget.regions[0].write = lambda offset, data: gadget.intx.set(True)

    def irq(wire: Wire, flags: int, fd: int) -> None:
        request = IrqSet(argsz=20, flags=flags, index=PciIrq.INTX, start=0, count=1).build()
        wire.call(Command.DEVICE_SET_IRQS, request, [fd])

    def client() -> None:
        wire = Wire.connect(path)
        irq(wire, IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER, raised)
        irq(wire, IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_UNMASK, unmask)
        # From the server's own thread: a device is called from no other.
        wire.call(Command.REGION_WRITE, RegionAccess(offset=0, region=0, count=1).build() + b"1")
        for _ in range(3):  # asserted all the time: each end of interrupt raises it again
            assert select.select([raised], [], [], 10)[0], "INTx was not signalled again"
            assert os.eventfd_read(raised) == 1
            os.eventfd_write(unmask, 1)
        wire.close()

    serve(gadget, path, client)
    os.close(raised)
    os.close(unmask)


def test_a_doorbell_wakes_the_loop_once(
    gadget: Gadget, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deferred work is done with the message that caused it, not in one more turn of the loop."""
    turns: list[int] = []
    run = Server.run_deferred

    def counted(server: Server) -> None:
        turns.append(len(gadget.log))
        run(server)

    def work() -> None:
        gadget.log.append(("work",))
        if gadget.log.count(("work",)) < 3:  # what deferred work defers is done as well
            gadget.defer(work)

    def client() -> None:
        wire = Wire.connect(path)
        wire.call(Command.REGION_WRITE, RegionAccess(offset=0, region=0, count=1).build() + b"1")
        while gadget.log.count(("work",)) < 3:
            wire.call(Command.DEVICE_GET_INFO, bytes([16]) + bytes(15))
        wire.close()

    monkeypatch.setattr(Server, "run_deferred", counted)
    gadget.regions[0].write = lambda offset, data: gadget.defer(work)
    serve(gadget, path, client)
    assert turns[:3] == [1, 1, 2], "VERSION, the doorbell, and what its work deferred"


class TestQuiesce:
    """A device that needs time before its memory or its state changes."""

    def test_the_command_waits(self, gadget: Gadget, path: Path) -> None:
        async def quiesce() -> None:
            gadget.log.append(("quiesce",))
            await asyncio.to_thread(may_end.wait)
            gadget.log.append(("quiet",))

        may_end = threading.Event()
        gadget.quiesce = quiesce  # type: ignore[method-assign]

        def client() -> None:
            wire = Wire.connect(path)
            ram = Ram(0x10000, 0x10000)
            request = DmaMap(argsz=32, flags=3, offset=0, address=ram.address, size=ram.size)
            read = RegionAccess(offset=0, region=0, count=4).build()
            wire.send(message(Command.DMA_MAP, request.build(), msg_id=1), [ram.fd])
            wire.send(message(Command.REGION_READ, read, msg_id=2))
            may_end.set()
            assert [wire.receive()[0].id for _ in range(2)] == [1, 2], "in order"
            ram.close()
            wire.close()

        serve(gadget, path, client)
        calls = [entry[0] for entry in gadget.log]
        assert calls[:5] == ["attached", "quiesce", "quiet", "map", "read"]

    def test_a_device_that_cannot(self, gadget: Gadget, path: Path) -> None:
        async def quiesce() -> None:
            await asyncio.sleep(0)
            raise RequestError(errno.ENOTTY, "not now")

        gadget.quiesce = quiesce  # type: ignore[method-assign]

        def client() -> None:
            wire = Wire.connect(path)
            wire.send(message(Command.DEVICE_RESET, msg_id=7))
            assert wire.receive()[0].error == errno.ENOTTY
            wire.call(Command.DEVICE_GET_INFO, bytes([16]) + bytes(15))
            wire.close()

        serve(gadget, path, client)
        assert ("reset",) not in gadget.log

    def test_a_client_that_disconnects_meanwhile(self, gadget: Gadget, path: Path) -> None:
        cancelled: list[bool] = []
        began = threading.Event()

        async def quiesce() -> None:
            began.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

        gadget.quiesce = quiesce  # type: ignore[method-assign]
        before = open_fds()

        def client() -> None:
            wire = Wire.connect(path)
            fd = os.eventfd(0)
            wire.send(message(Command.DMA_UNMAP, bytes(24)))
            wire.send(message(Command.DEVICE_GET_INFO, bytes(16)), [fd])
            os.close(fd)
            began.wait(10)
            wire.close()
            gadget.quiesce = lambda: None  # type: ignore[method-assign]
            again = Wire.connect(path)
            again.call(Command.DEVICE_RESET)
            again.close()

        serve(gadget, path, client)
        assert cancelled == [True]
        assert open_fds() == before


class TestHooksThatWait:
    """``async def`` of ``dma_unmapped``, ``reset`` and ``set_running``."""

    def hold(self, gadget: Gadget, name: str) -> tuple[threading.Event, threading.Event]:
        """Replace a hook by one that waits for the second event; it sets the first."""
        began, may_end = threading.Event(), threading.Event()

        async def hook(*args: object) -> None:
            gadget.log.append((name, "begins"))
            began.set()
            await asyncio.to_thread(may_end.wait)
            gadget.log.append((name, "ends"))

        setattr(gadget, name, hook)
        return began, may_end

    def ordered(
        self, gadget: Gadget, path: Path, name: str, command: int, payload: bytes = b""
    ) -> list[tuple[object, ...]]:
        """Send *command* and a read after it; return what the device was asked to do."""
        began, may_end = self.hold(gadget, name)
        gadget.dma.on_unmap = gadget.dma_unmapped

        def client() -> None:
            wire = Wire.connect(path)
            ram = Ram(0x10000, 0x10000)
            wire.map(ram, [ram.fd])
            wire.send(message(command, payload, msg_id=1))
            assert began.wait(10)
            read = RegionAccess(offset=0, region=0, count=4).build()
            wire.send(message(Command.REGION_READ, read, msg_id=2))
            may_end.set()
            replies = [wire.receive()[0] for _ in range(2)]
            assert [(head.id, head.error) for head in replies] == [(1, 0), (2, 0)]
            ram.close()
            wire.close()

        serve(gadget, path, client)
        return gadget.log

    def test_reset(self, gadget: Gadget, path: Path) -> None:
        log = self.ordered(gadget, path, "reset", Command.DEVICE_RESET)
        assert log[2:5] == [("reset", "begins"), ("reset", "ends"), ("read", 0, 4)]

    def test_dma_unmapped(self, gadget: Gadget, path: Path) -> None:
        request = DmaUnmap(argsz=24, flags=0, address=0x10000, size=0x10000).build()
        log = self.ordered(gadget, path, "dma_unmapped", Command.DMA_UNMAP, request)
        assert log[2:5] == [("dma_unmapped", "begins"), ("dma_unmapped", "ends"), ("read", 0, 4)]

    def test_set_running_before_the_state_is_saved(self, gadget: Gadget, path: Path) -> None:
        def save() -> bytes:
            gadget.log.append(("save",))
            return b"state"

        gadget.save_state = save  # type: ignore[method-assign]
        state = MigState(device_state=DeviceState.STOP_COPY, data_fd=0).build()
        flags = Feature.MIG_DEVICE_STATE | FeatureFlags.SET
        request = DeviceFeature(argsz=16, flags=flags).build() + state
        log = self.ordered(gadget, path, "set_running", Command.DEVICE_FEATURE, request)
        expected = [("set_running", "begins"), ("set_running", "ends"), ("save",), ("read", 0, 4)]
        assert log[2:6] == expected

    def test_a_failure_is_the_answer(self, gadget: Gadget, path: Path) -> None:
        async def reset() -> None:
            await asyncio.sleep(0)
            raise RequestError(errno.ENOTTY, "not now")

        gadget.reset = reset  # type: ignore[method-assign, assignment]

        def client() -> None:
            wire = Wire.connect(path)
            wire.send(message(Command.DEVICE_RESET, msg_id=3))
            assert wire.receive()[0].error == errno.ENOTTY
            wire.call(Command.DEVICE_GET_INFO, bytes([16]) + bytes(15))
            wire.close()

        serve(gadget, path, client)

    def test_memory_is_held_until_the_hook_of_a_lost_client_has_ended(
        self, gadget: Gadget, path: Path
    ) -> None:
        """The next client is served after that."""
        began, may_end = self.hold(gadget, "dma_unmapped")
        gadget.dma.on_unmap = gadget.dma_unmapped
        before = open_fds()

        def client() -> None:
            first = Wire.connect(path)
            ram = Ram(0x10000, 0x10000)
            first.map(ram, [ram.fd])
            first.close()
            assert began.wait(10)
            second = Wire(socket.socket(socket.AF_UNIX))
            second.sock.connect(str(path))
            data = Version(major=0, minor=0).build() + QEMU_VERSION_DATA
            second.send(message(Command.VERSION, data, msg_id=5))
            assert gadget.log.count(("attached",)) == 1
            may_end.set()
            assert second.receive()[0].error == 0
            second.map(ram, [ram.fd])
            second.close()
            ram.close()

        serve(gadget, path, client)
        calls = [entry for entry in gadget.log if entry[0] in ("attached", "dma_unmapped")]
        assert calls[:4] == [
            ("attached",),
            ("dma_unmapped", "begins"),
            ("dma_unmapped", "ends"),
            ("attached",),
        ]
        assert open_fds() - before <= 1

    def test_a_reset_that_the_guest_asks_for_waits_for_quiesce(
        self, gadget: Gadget, path: Path
    ) -> None:
        began, may_end = self.hold(gadget, "quiesce")
        gadget.regions[0].write = lambda offset, data: gadget.request_reset()

        def client() -> None:
            wire = Wire.connect(path)
            access = RegionAccess(offset=0, region=0, count=1).build()
            wire.call(Command.REGION_WRITE, access + b"1")
            assert began.wait(10)
            wire.send(message(Command.REGION_READ, access, msg_id=9))
            may_end.set()
            assert wire.receive()[0].id == 9
            wire.close()

        serve(gadget, path, client)
        assert gadget.log[1:5] == [
            ("quiesce", "begins"),
            ("quiesce", "ends"),
            ("reset",),
            ("read", 0, 1),
        ]
