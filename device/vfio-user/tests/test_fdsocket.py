# SPDX-License-Identifier: Apache-2.0
"""The socket shell: descriptors reach the right message, nothing leaks, output is bounded."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import threading

import pytest
from helpers import open_fds

import fdsocket
from fdsocket import FdStream


class Recorder:
    """A receiver that keeps what it is given."""

    def __init__(self, wanted: int = 4096) -> None:
        self.size = wanted
        self.got: list[tuple[bytes, list[int]]] = []
        self.ended = asyncio.Event()
        self.reasons: list[str | None] = []

    def wanted(self) -> int:
        return self.size

    def received(self, data: bytes, fds: list[int]) -> None:
        self.got.append((data, fds))

    def closed(self, error: str | None) -> None:
        self.reasons.append(error)
        self.ended.set()

    @property
    def data(self) -> bytes:
        return b"".join(data for data, _ in self.got)

    def close(self) -> None:
        for _, fds in self.got:
            fdsocket.close_fds(fds)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    before = open_fds()
    yield ours, theirs
    ours.close()
    theirs.close()
    assert open_fds() <= before - 2, "descriptors leaked"


async def until(condition, seconds=5.0):
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("did not happen in time")


def run(coroutine):
    return asyncio.run(coroutine)


def test_descriptors_come_with_the_message_they_were_sent_with(pair):
    ours, theirs = pair

    async def go():
        seen = Recorder(wanted=4)
        stream = FdStream(ours, seen)
        stream.start()
        fdsocket.send_some(theirs, b"aaaa")
        fdsocket.send_some(theirs, b"bbbb", [0, 1])
        fdsocket.send_some(theirs, b"cccc")
        fdsocket.send_some(theirs, b"dddd", [2])
        await until(lambda: len(seen.got) == 4)
        assert [(data, len(fds)) for data, fds in seen.got] == [
            (b"aaaa", 0),
            (b"bbbb", 2),
            (b"cccc", 0),
            (b"dddd", 1),
        ]
        assert all(not os.get_inheritable(fd) for _, fds in seen.got for fd in fds)
        stream.close()
        await seen.ended.wait()
        seen.close()

    run(go())


def test_end_of_file_is_reported_once_and_orderly(pair):
    ours, theirs = pair

    async def go():
        seen = Recorder()
        stream = FdStream(ours, seen)
        stream.start()
        theirs.sendall(b"last words")
        theirs.close()
        await seen.ended.wait()
        stream.close()
        await asyncio.sleep(0.01)
        assert (seen.data, seen.reasons, stream.is_open) == (b"last words", [None], False)

    run(go())


def test_output_keeps_its_order_and_its_descriptors_through_a_full_socket(pair):
    ours, theirs = pair

    async def go():
        stream = FdStream(ours, Recorder(), output_limit=8 << 20)
        stream.start()
        reader, writer = os.pipe()
        blocks = [bytes([i]) * 300_000 for i in range(8)]
        for i, block in enumerate(blocks):
            stream.send(block, [writer] if i == 5 else [])
        assert stream.queued > 0, "the socket took everything: the test shows nothing"
        theirs.setblocking(False)
        got, fds_at = bytearray(), []
        while len(got) < sum(map(len, blocks)):
            try:
                data, fds = fdsocket.receive_some(theirs, 65536)
            except BlockingIOError:
                await asyncio.sleep(0.001)
                continue
            if fds:
                fds_at.append(len(got) + len(data))
                fdsocket.close_fds(fds)
            got += data
        assert bytes(got) == b"".join(blocks)
        assert len(fds_at) == 1
        assert fds_at[0] > 5 * 300_000, "the descriptor travelled with the wrong block"
        assert os.read(reader, 1) == b"", "our copy of the sent descriptor is still open"
        os.close(reader)
        assert stream.queued == 0
        stream.close()

    run(go())


def test_a_peer_that_never_reads_is_not_read_from(pair):
    """Backpressure: requests wait while more than the limit of replies is queued."""
    ours, theirs = pair

    async def go():
        class Echo(Recorder):
            def received(self, data, fds):
                super().received(data, fds)
                stream.send(data * 10_000)

        seen = Echo(wanted=16)
        stream = FdStream(ours, seen, output_limit=200_000)
        stream.start()
        theirs.setblocking(False)
        for _ in range(200):
            theirs.send(b"x" * 16)
        await until(lambda: stream.queued > 200_000)
        handled = len(seen.got)
        await asyncio.sleep(0.05)
        assert len(seen.got) == handled < 200
        assert stream.queued < 200_000 + 160_001
        got = 0
        while got < 200 * 160_000:
            try:
                got += len(theirs.recv(1 << 20))
            except BlockingIOError:
                await asyncio.sleep(0.001)
        assert len(seen.got) == 200, "reading did not resume"
        stream.close()

    run(go())


def test_unasked_output_is_bounded_too(pair):
    ours, theirs = pair

    async def go():
        seen = Recorder()
        stream = FdStream(ours, seen, output_limit=100_000)
        stream.start()
        reader, writer = os.pipe()
        stream.send(b"a" * 1_000_000, [writer])
        await seen.ended.wait()
        assert "does not read" in seen.reasons[0]
        stream.send(b"after the end", [os.dup(reader)])
        os.close(reader)

    run(go())
    assert theirs.fileno() >= 0


def test_send_to_a_peer_that_has_gone_ends_the_connection_without_raising(pair):
    ours, theirs = pair

    async def go():
        seen = Recorder()
        stream = FdStream(ours, seen)
        stream.start()
        theirs.close()
        stream.send(b"hello", [os.dup(0)])
        assert seen.reasons == [], "reported from inside send()"
        await seen.ended.wait()
        assert not stream.is_open

    run(go())


def test_send_refuses_what_cannot_travel(pair):
    ours, _ = pair
    stream = FdStream(ours, Recorder())
    with pytest.raises(ValueError, match="254 descriptors"):
        stream.send(b"x", [os.dup(0) for _ in range(254)])
    with pytest.raises(ValueError, match="with 0 bytes"):
        stream.send(b"", [os.dup(0)])
    stream.close()


def test_close_when_sent_drains_first(pair):
    ours, theirs = pair

    async def go():
        seen = Recorder()
        stream = FdStream(ours, seen, output_limit=8 << 20)
        stream.start()
        stream.send(b"z" * 2_000_000)
        stream.close_when_sent()
        stream.send(b"too late")
        got = await asyncio.to_thread(read_all, theirs)
        assert got == b"z" * 2_000_000
        await seen.ended.wait()
        assert seen.reasons == [None]

    run(go())


def read_all(sock: socket.socket) -> bytes:
    out = bytearray()
    while data := sock.recv(1 << 16):
        out += data
    return bytes(out)


def test_blocking_receive_flushes_and_waits(pair):
    ours, theirs = pair

    def answer():
        question = theirs.recv(100)
        fdsocket.send_some(theirs, question[::-1], [0])

    async def go():
        seen = Recorder()
        stream = FdStream(ours, seen)
        stream.start()
        thread = threading.Thread(target=answer)
        thread.start()
        stream.send(b"abc")
        data, fds = stream.receive(100, timeout=5)
        thread.join()
        assert (data, len(fds), seen.got) == (b"cba", 1, [])
        fdsocket.close_fds(fds)
        with pytest.raises(TimeoutError):
            stream.receive(1, timeout=0.02)
        theirs.close()
        with pytest.raises(ConnectionError):
            stream.receive(1, timeout=5)
        await seen.ended.wait()
        assert seen.reasons == [None]

    run(go())


def test_lost_descriptors_are_an_error_and_none_of_them_stays_open(pair):
    """MSG_CTRUNC: the process may open no more files while a message with descriptors comes in."""
    ours, theirs = pair
    fdsocket.send_some(theirs, b"message", [0] * 20)
    before = open_fds()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    fifth_free = [number for number in range(1000) if number not in taken][5]
    resource.setrlimit(resource.RLIMIT_NOFILE, (fifth_free, hard))
    try:
        with pytest.raises(fdsocket.TruncatedError):
            fdsocket.receive_some(ours, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_fds() == before


def test_listen_takes_over_a_dead_path_and_leaves_a_living_one(tmp_path):
    path = tmp_path / "s"
    first = fdsocket.listen(path)
    with pytest.raises(fdsocket.AddressInUse, match="another server"):
        fdsocket.listen(path)
    assert path.exists()
    first.close()
    second = fdsocket.listen(path)
    client = fdsocket.connect(path)
    assert fdsocket.is_listening(second)
    assert not fdsocket.is_listening(client)
    client.close()
    second.close()


def test_listen_does_not_remove_what_is_not_a_socket(tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(fdsocket.AddressInUse, match="not a socket"):
        fdsocket.listen(path)
    assert path.read_text() == "data"


def test_connect_to_nobody_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        fdsocket.connect(tmp_path / "none")


def test_connect_to_a_server_that_accepts_nobody_does_not_block(tmp_path):
    with fdsocket.listen(tmp_path / "s", backlog=0):
        waiting = [fdsocket.connect(tmp_path / "s")]
        with pytest.raises(BlockingIOError):
            waiting.append(fdsocket.connect(tmp_path / "s"))
        for sock in waiting:
            sock.close()


def test_adopt_wants_a_unix_stream_socket():
    ours, theirs = socket.socketpair()
    sock = fdsocket.adopt(ours.detach())
    assert not sock.get_inheritable()
    assert sock.getblocking() is False
    sock.close()
    theirs.close()
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="not a socket"):
        fdsocket.adopt(reader)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with pytest.raises(OSError, match="not a Unix stream"):
        fdsocket.adopt(udp.fileno())
    assert udp.fileno() >= 0, "the descriptor is still the caller's"
    udp.close()
    os.close(reader)
    os.close(writer)


def test_no_descriptor_left_is_told_and_tried_again_later(tmp_path) -> None:
    """Two refusals at most a moment apart, no busy loop between them; then the client is served."""
    told: list[int | None] = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def main() -> None:
        came = asyncio.get_running_loop().create_future()
        acceptor = fdsocket.Acceptor(
            fdsocket.listen(tmp_path / "s"), came.set_result, lambda error: told.append(error.errno)
        )
        acceptor.retry_seconds = 0.1
        acceptor.resume()
        client = fdsocket.connect(tmp_path / "s")
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free(), limits[1]))
            await asyncio.sleep(0.15)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert not came.done()
        (await asyncio.wait_for(came, 5)).close()
        client.close()
        acceptor.close()

    asyncio.run(main())
    assert 1 <= len(told) <= 2
    assert set(told) == {errno.EMFILE}


def lowest_free() -> int:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    return fd


def test_an_acceptor_that_waits_can_be_closed(tmp_path) -> None:
    """Nothing is tried again after that, on a descriptor that may be another one by then."""

    errors = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, error: errors.append(error))
        acceptor = fdsocket.Acceptor(fdsocket.listen(tmp_path / "s"), socket.socket.close, print)
        acceptor.retry_seconds = 0.01
        acceptor.resume()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        client = fdsocket.connect(tmp_path / "s")
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free(), limits[1]))
            await asyncio.sleep(0.005)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        acceptor.close()
        client.close()
        await asyncio.sleep(0.05)

    asyncio.run(main())
    assert not errors
