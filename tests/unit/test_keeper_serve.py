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

    def __init__(self, folder, kill_at="", sandbox="on", path="", transport="vhost-user"):
        self.folder = folder
        self.log = folder / "log"
        environment = dict(os.environ) | {"VBALLOON_KILL_AT": kill_at, "PYTHONPATH": str(path)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vballoon", "serve", "--sandbox", sandbox,
                 f"--{transport}", folder / "b", "--control", folder / "c"],
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

    def wait_said(self, text, count=1):
        end = time.monotonic() + 60
        while self.said().count(text) < count:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)

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


def test_an_upgrade_is_invisible_to_the_front_end(tmp_path):
    """SIGUSR2 twice: another program in the same process serves the same connection."""
    with Keeper(tmp_path) as keeper, keeper.frontend(make_memory((0, 64 << 20))) as frontend:
        frontend.negotiate()
        frontend.share_memory()
        frontend.open_channel()
        rings = [frontend.new_ring(index) for index in (0, 1)]
        frontend.status_ok()
        inflate(frontend, rings[0], 0x200)
        workers = {keeper.pid()}
        for round_number in (1, 2):
            keeper.process.send_signal(signal.SIGUSR2)
            keeper.wait_said("serving", 1 + round_number)
            assert frontend.get_u64(Request.GET_QUEUE_NUM) == 6
            inflate(frontend, rings[0], 0x200 + 0x100 * round_number)
            workers.add(keeper.pid())
        assert len(workers) == 3
        assert keeper.deaths() == 0, keeper.said()
        with keeper.control() as client:
            bits = client.execute("query-skip-bitmap")
            assert bits["ballooned-ever"] == 3 * 16  # each program passed them to the next


def test_an_upgrade_to_a_program_that_does_not_start_is_refused(tmp_path):
    package = tmp_path / "broken"
    package.mkdir()
    with Keeper(tmp_path, path=package) as keeper:
        worker = keeper.pid()
        (package / "fdsocket.py").write_text("raise SystemExit(3)")
        keeper.process.send_signal(signal.SIGUSR2)
        keeper.wait_said("upgrade refused: the installed program does not start")
        assert keeper.pid() == worker


def test_an_upgrade_is_refused_for_vfio_user(tmp_path):
    """Its connection would end with the worker, and the virtual machine would lose the device."""
    with Keeper(tmp_path, transport="vfio-user") as keeper:
        worker = keeper.pid()
        keeper.process.send_signal(signal.SIGUSR2)
        keeper.wait_said("upgrade refused: a vfio-user connection ends with its worker")
        assert keeper.pid() == worker
