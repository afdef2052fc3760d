# SPDX-License-Identifier: Apache-2.0
"""A server is killed at every step of a message: each is handled once, each answer sent once.

A child process serves a counting protocol on one end of a socket pair and dies by SIGKILL where it
is asked to; the next child gets the same descriptors, as a restarted worker would.
"""

from __future__ import annotations

import array
import asyncio
import os
import select
import signal
import socket
import struct

import pytest

from fdsocket import close_fds
from vballoon.keeper import fault
from vballoon.keeper.answers import ANSWER_MAX, AnswerFile
from vballoon.keeper.journal import Journal
from vballoon.keeper.kcmp import same_file
from vballoon.keeper.stream import MessageStream, Progress

HEADER = struct.Struct("<II")
QUIET, COUNT, BIG, DESCRIPTOR = range(4)
STATE = struct.Struct("<QQQQ")
BIG_ANSWER = 600_000
STEPS = (
    "message-peeked",
    "message-handled",
    "message-marked",
    "answer-prepared",
    "journal-begin",
    "journal-first",
    "journal-written",
    "message-committed",
    "answer-sent-part",
    "message-answered",
    "message-taken",
    "message-settled",
)


class Framing:
    header = HEADER.size

    def total(self, header):
        return HEADER.size + HEADER.unpack(header)[1]


class Counting:
    """Adds up what it is sent; answers with the sum.  The sum is the state that is journaled."""

    def __init__(self, sock, journal, answers):
        self.journal = journal
        self.sum = 0
        progress = None
        if journal.content is not None:
            self.sum, *numbers = STATE.unpack(journal.content)
            progress = Progress(*numbers)
        self.stream = MessageStream(sock, self, Framing(), answers, self.commit, progress=progress)
        self.stream.start()

    def received(self, data, fds):
        kind, size = HEADER.unpack(data[:8])
        if len(data) == 8 + size:
            self.sum += sum(data[8:]) + 1000 * len(fds)
            answer = struct.pack("<Q", self.sum)
            if kind == DESCRIPTOR:
                self.stream.send(answer, [os.eventfd(0)])
            elif kind != QUIET:
                self.stream.send(answer * (BIG_ANSWER // 8 if kind == BIG else 1))
        close_fds(fds)

    def commit(self, progress):
        p = progress
        self.journal.write(STATE.pack(self.sum, p.number, p.size, p.answer))

    def closed(self, reason):
        asyncio.get_running_loop().stop()


class Server:
    """Children that serve one after the other; each dies at its step, the last one lives."""

    def __init__(self):
        self.sock, self.theirs = socket.socketpair()
        self.journal, self.answers = Journal.create(1), AnswerFile.create()
        os.lockf(self.journal.fd, os.F_ULOCK, 0)  # the lock is the children's
        self.sock.settimeout(10)
        self.pid = self.deaths = 0

    def start(self, kill_at=""):
        self.pid = os.fork()
        if not self.pid:
            try:
                self.sock.close()
                fault.arm(kill_at)
                asyncio.run(self._serve())
            finally:
                os._exit(0)

    async def _serve(self):
        # the journal object of the parent knows no record: read it as a new process does
        Counting(self.theirs, Journal(self.journal.fd, 1), self.answers)
        await asyncio.get_running_loop().create_future()

    def died(self):
        """Wait for the planned death, and start the next child."""
        assert os.waitpid(self.pid, 0)[1] == signal.SIGKILL
        self.deaths += 1
        self.start()

    def end(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.sock.close()
        self.theirs.close()
        self.journal.close()
        self.answers.close()

    def send(self, kind, payload, fds=(), pieces=1):
        data = HEADER.pack(kind, len(payload)) + payload
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        at = len(data) // pieces
        self.sock.sendmsg([data[:at] if pieces > 1 else data], control)
        if pieces > 1:
            self.sock.sendall(data[at:])

    def answer(self, size=8):
        """Return the next answer; replace a child that dies instead of answering."""
        data = b""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        child = os.pidfd_open(self.pid)
        poll.register(child, select.POLLIN)
        while len(data) < size:
            ready = dict(poll.poll(10_000))
            assert ready, "no answer"
            if self.sock.fileno() in ready:
                data += self.sock.recv(size - len(data))
            elif child in ready:
                poll.unregister(child)
                self.died()
        os.close(child)
        return data

    def silent(self):
        """Nothing more arrives (the next answer would show a surplus one, too)."""
        return not select.select([self.sock], [], [], 0.05)[0]


@pytest.fixture
def server():
    server = Server()
    yield server
    server.end()


def conversation(server):
    """Lockstep, equal messages in a row, unanswered ones, descriptors, pieces, big answers."""
    total = 0
    event = os.eventfd(0)
    for number in range(3):
        server.send(COUNT, b"\x05")
        total += 5
        assert server.answer() == struct.pack("<Q", total)
        server.send(QUIET, b"\x07\x01", [event])
        total += 1008
        server.send(COUNT, b"", [event, event], pieces=2)
        total += 2000
        assert server.answer() == struct.pack("<Q", total)
        server.send(BIG, b"\x01" * 50, pieces=3)
        total += 50
        big = BIG_ANSWER // 8 * 8
        assert server.answer(big) == struct.pack("<Q", total) * (BIG_ANSWER // 8), number
    os.close(event)


def test_a_conversation_without_a_death(server):
    server.start()
    conversation(server)
    assert server.silent()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_killed_at_every_step(server, step, count):
    server.start(f"{step}:{count}")
    conversation(server)
    assert server.silent()
    if server.deaths == 0:  # killed after the last answer that was waited for
        server.send(COUNT, b"\x01")
        server.answer()
    assert server.deaths == 1


def test_pipelined_equal_messages(server):
    """Requests sent without reading answers: pages of unread answers are not written again."""
    server.start("message-taken:5")
    for _ in range(20):
        server.send(COUNT, b"\x01")
    server.died()
    got = [struct.unpack("<Q", server.answer())[0] for _ in range(20)]
    assert got == list(range(1, 21))
    assert server.silent()


@pytest.mark.parametrize("step", ["message-peeked", "message-taken", "message-settled"])
def test_descriptors_of_the_next_message_are_not_those_of_this_one(server, step):
    """The kernel's peek hands them out: a message that waits in front must not get them."""
    event = os.eventfd(0)
    for _ in range(3):
        server.send(QUIET, b"\x01")
        server.send(QUIET, b"\x01", [event])
        server.send(COUNT, b"\x01")
        server.send(COUNT, b"", [event, event])
    server.start(f"{step}:4")
    server.died()
    got = [struct.unpack("<Q", server.answer())[0] for _ in range(6)]
    sums = [n * 3003 + extra for n in range(3) for extra in (1003, 3003)]
    assert got == sums
    os.close(event)


def test_a_peer_that_reads_late_gets_the_whole_answer(server):
    server.start("answer-sent-part:1")
    server.send(BIG, b"\x01")
    server.died()
    size = BIG_ANSWER // 8 * 8
    assert server.answer(size) == struct.pack("<Q", 1) * (size // 8)
    assert server.silent()


def test_descriptors_of_a_message_survive_a_death_before_it_is_handled(server):
    event = os.eventfd(0)
    server.start("message-peeked:1")
    server.send(COUNT, b"\x01", [event])
    server.died()
    assert struct.unpack("<Q", server.answer())[0] == 1001
    os.close(event)


def test_an_answer_with_descriptors(server):
    server.start()
    server.send(DESCRIPTOR, b"\x02")
    data, fds, _, _ = socket.recv_fds(server.sock, 8, 4)
    assert data == struct.pack("<Q", 2)
    assert len(fds) == 1
    os.close(fds[0])
    server.send(COUNT, b"\x02")
    assert server.answer() == struct.pack("<Q", 4)


def test_half_a_message_costs_no_time(server):
    server.start()
    server.send(COUNT, b"\x01")
    server.answer()
    server.sock.sendall(HEADER.pack(COUNT, 100))
    used = cpu_ticks(server.pid)
    assert server.silent()
    assert server.silent()
    assert cpu_ticks(server.pid) - used <= 1
    server.sock.sendall(b"\x01" * 100)
    assert struct.unpack("<Q", server.answer())[0] == 101


def cpu_ticks(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_descriptors_do_not_leak():
    """Peeks hand out copies: after many messages the process holds what it held before."""

    async def run():
        ours, theirs = socket.socketpair()
        journal, answers = Journal.create(1), AnswerFile.create()
        counting = Counting(theirs, journal, answers)
        event = os.eventfd(0)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            data = HEADER.pack(COUNT, 1) + b"\x01"
            socket.send_fds(ours, [data], [event, event])
            while not select.select([ours], [], [], 0)[0]:
                await asyncio.sleep(0)
            ours.recv(8)
        assert len(os.listdir("/proc/self/fd")) == before
        counting.stream.close()
        os.close(event)
        ours.close()
        journal.close()
        answers.close()

    asyncio.run(run_stopping(run))


async def run_stopping(run):
    """Run *run* without stopping the loop, which ``closed`` does in the children."""
    loop = asyncio.get_running_loop()
    loop.stop = lambda: None
    await run()
    del loop.stop


def test_unread_answers_are_not_overwritten():
    """sendfile passes pages: without fresh ones the peer would read the next answers' bytes."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    answers = AnswerFile.create()
    sent = [b"%064d" % number for number in range(8)]
    for number, data in enumerate(sent):
        answers.prepare(number, data)
        assert answers.unsent(number, 64) == 64
        assert answers.send(theirs.fileno(), number, 64)
        assert answers.unsent(number, 64) == 0
    assert ours.recv(4096) == b"".join(sent)
    with pytest.raises(ValueError, match="an answer of"):
        answers.prepare(0, bytes(ANSWER_MAX + 1))
    for sock in (ours, theirs, answers):
        sock.close()


def test_a_copy_is_the_same_file():
    answers = AnswerFile.create()
    copy = os.dup(answers.fd)
    assert same_file(copy, answers.fd)
    os.close(copy)
    answers.close()
