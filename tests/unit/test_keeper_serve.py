# SPDX-License-Identifier: Apache-2.0
"""``vballoon serve`` with its workers killed: the front-end sees nothing of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from tests.fakes.frontend import Frontend
from tests.fakes.memory import make_memory

from vballoon.control import ControlClient
from virtio_formats.vhost_user import Request


class Keeper:
    """A ``vballoon serve`` process, its log in a file."""

    def __init__(self, folder, *words, kill_at="", sandbox="on"):
        self.folder = folder
        self.log = folder / "log"
        environment = dict(os.environ) | {"VBALLOON_KILL_AT": kill_at}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vballoon", "serve", "--sandbox", sandbox,
                 "--vhost-user", folder / "b", "--control", folder / "c", *words],
                stdin=subprocess.DEVNULL,
                stderr=log,
                env=environment,
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(20) == 0
        finally:
            self.process.kill()
            self.process.wait()
        assert "Traceback" not in self.said()

    def said(self):
        return self.log.read_text()

    def control(self):
        end = time.monotonic() + 30
        while True:
            try:
                return ControlClient(self.folder / "c")
            except Exception:
                assert time.monotonic() < end, self.said()
                time.sleep(0.01)

    def frontend(self, memory=None):
        end = time.monotonic() + 30
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(str(self.folder / "b"))
                return Frontend(sock, memory)
            except OSError:
                sock.close()
                assert time.monotonic() < end, self.said()
                time.sleep(0.01)

    def pid(self):
        """Return the worker's process id."""
        with self.control() as client:
            return client.execute("query-status")["pid"]

    def kill(self):
        pid = self.pid()
        os.kill(pid, signal.SIGKILL)
        return pid

    def deaths(self):
        return self.said().count("it is started again")


STEPS = (
    "message-peeked",
    "message-handled",
    "message-marked",
    "answer-prepared",
    "descriptors-stored",
    "journal-begin",
    "journal-first",
    "journal-written",
    "message-committed",
    "answer-sent-part",
    "message-answered",
    "message-taken",
    "message-settled",
)


def inflate(frontend, ring, first, count=16):
    """Put pages into the balloon; they become holes of the memory file."""
    pfns = range(first, first + count)
    for pfn in pfns:
        frontend.memory.write(pfn << 12, b"data")
    ring.submit(b"".join(pfn.to_bytes(4, "little") for pfn in pfns))
    ring.kick()
    assert len(ring.collect(1, 20)) == 1
    assert all(frontend.memory.read(pfn << 12, 4) == bytes(4) for pfn in pfns)


def session(frontend):
    """All that QEMU does with a balloon, answers checked."""
    frontend.negotiate()
    assert frontend.get_u64(Request.GET_QUEUE_NUM) == 6
    assert frontend.get_u64(Request.GET_QUEUE_NUM) == 6  # equal messages in a row
    frontend.share_memory()
    frontend.open_channel()
    rings = [frontend.new_ring(index) for index in (0, 1)]
    frontend.status_ok()
    for _ in range(2):  # the same file again: the store keeps it once, under its first name
        frontend.ok(Request.SET_VRING_CALL, frontend.u64(0), [rings[0].call_fd])
    inflate(frontend, rings[0], 0x200)
    assert frontend.get_u64(Request.GET_QUEUE_NUM) == 6
    inflate(frontend, rings[0], 0x300)
    assert [frontend.stop_ring(ring) for ring in rings] == [2, 0]
    assert frontend.get_u64(Request.GET_QUEUE_NUM) == 6


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_every_step_of_a_session(tmp_path, step):
    """Each of four workers dies at this step, after another number of messages."""
    plan = ",".join(f"{step}:{count}" for count in (1, 3, 5, 9))
    with (
        Keeper(tmp_path, kill_at=plan) as keeper,
        keeper.frontend(make_memory((0, 64 << 20))) as frontend,
    ):
        session(frontend)
        assert keeper.deaths() == 4, keeper.said()
