# SPDX-License-Identifier: Apache-2.0
"""End the snapshot, its guardian, both, the receiver or QEMU at each step of each way.

Afterwards exactly one of these holds: the guest runs where it was, with its balloon, and there is
no snapshot or a right one; or only after *gone* (or with ``quit``) it is stopped, and
what is printed works.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fakes.memory import memfd
from tests.fakes.qemu_monitor import FakeQemu

from vballoon.errors import UsageError
from vballoon.snapshot.journal import JournalFile
from vballoon.snapshot.lock import lock_vm
from vballoon.snapshot.process import Process, identity
from vballoon.snapshot.qmp_vm import QemuVm
from vballoon.snapshot.receive import PENDING_FILE
from vballoon.snapshot.recovery import undo_file
from vballoon.snapshot.run import Observer, Options, Run, Step
from vballoon.snapshot.source import GuestSource, RamFile
from vballoon.snapshot.store import DirectoryStore, open_snapshot
from vballoon.snapshot.take import COLD, LIVE, MOVE, take, way

PAGE = 4096
SIZE = 16 * PAGE
ME = Process(os.getpid())
SNAPSHOT = """
import json, os, signal, sys
from vballoon.errors import UsageError
from vballoon.memory import ByteRanges
from vballoon.snapshot.link import Link
from vballoon.snapshot.pipe import MoveStore
from vballoon.snapshot.qmp_vm import QemuVm
from vballoon.snapshot.run import Observer, Options, Run, Step
from vballoon.snapshot.send import Sender
from vballoon.snapshot.source import GuestSource, RamFile
from vballoon.snapshot.store import DirectoryStore
from vballoon.snapshot.take import take

given = json.loads(sys.argv[1])
SIZE = given["size"]

class Control:
    def execute(self, command, arguments=None):
        if command == "query-status":
            return {"pid": os.getpid()}
        raise UsageError("the driver lacks it")

class Tracker:
    def start(self): pass
    def collect(self): return [ByteRanges([0], [4096])]

class Killer(Observer):
    def step(self, name):
        if name != given["where"]:
            return
        guardian = run.guardian.pid if run.guardian else 0
        if given["victim"] in ("guardian", "both") and guardian:
            os.kill(guardian, signal.SIGKILL)
            os.waitid(os.P_PID, guardian, os.WEXITED | os.WNOWAIT)
        if given["victim"] in ("snapshot", "both"):
            os.kill(os.getpid(), signal.SIGKILL)

def connect():
    while True:  # until the receiver listens
        try:
            return Link.connect(given["link"], silence=20)
        except UsageError:
            pass

def main():
    global run
    fd = os.open(f"/proc/{given['pid']}/fd/{given['fd']}", os.O_RDONLY)
    source = GuestSource([RamFile(fd, SIZE, [(0, SIZE, 0)], given["host"])], None, "", None, None)
    options = Options(**given["options"])
    with QemuVm(given["qmp"]) as vm:
        link = connect() if options.move else None
        store = MoveStore(link) if link else DirectoryStore(given["directory"])
        run = Run(vm, source, store, options, Killer(), control=Control(),
                  make_tracker=lambda blocks: Tracker())
        run.sender = Sender(link, store) if link else None
        take(run)

try:
    main()
except UsageError as error:
    sys.exit(f"refused: {error}")
"""
RECEIVER = """
import os, signal, sys
from pathlib import Path
from vballoon.errors import UsageError
from vballoon.snapshot.link import Link
from vballoon.snapshot.receive import Receiver

path, directory, where = sys.argv[1:]

def at(name):
    if name == where:
        os.kill(os.getpid(), signal.SIGKILL)

Path(directory).mkdir()
with Link.listen(path, silence=20) as link:
    receiver = Receiver(link, Path(directory))
    try:
        at("receiving")
        receiver.receive()
        at("verified")
        receiver.wait_commit()
        at("committed")
        print("runs", flush=True)
        at("runs")
        receiver.running()
    except UsageError as error:
        sys.exit(f"refused: {error}")
"""


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[FakeQemu]:
    with FakeQemu(tmp_path / "qmp", SIZE) as served:
        yield served


@pytest.fixture
def memory(qemu: FakeQemu) -> Iterator[int]:
    fd = memfd(SIZE)
    os.pwrite(fd, os.urandom(SIZE // 2), 0)
    qemu.map_memory(fd)
    yield fd
    os.close(fd)


def killed(
    qemu: FakeQemu, fd: int, folder: Path, victim: str, where: str, **options: bool
) -> subprocess.CompletedProcess[str]:
    """Run a snapshot of which *victim* is killed when step *where* begins."""
    given = {
        "size": SIZE, "pid": os.getpid(), "fd": fd, "host": qemu.host, "qmp": str(folder / "qmp"),
        "directory": str(folder / "snap"), "link": str(folder / "link"), "victim": victim,
        "where": where, "options": options,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT, json.dumps(given)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    deadline = time.monotonic() + 60
    while True:  # until the guardian has ended, too
        try:
            os.close(lock_vm(ME, identity(fd)))
            return done
        except UsageError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def right(folder: Path, fd: int) -> bool:
    """Return whether there is a whole snapshot, which must then have the right content."""
    try:
        open_snapshot(folder)
    except UsageError:
        return False
    assert (folder / "mem.ram").read_bytes() == os.pread(fd, SIZE, 0)
    return True


WAYS: dict[str, tuple[tuple[Step, ...], dict[str, bool]]] = {
    "cold": (COLD, {}),
    "live": (LIVE, {"live": True}),
}
PLACES = [("cold", step.name) for step in COLD]
PLACES += [("live", step.name) for step in LIVE if step not in COLD]


@pytest.mark.parametrize(("name", "where"), PLACES)
def test_killed_snapshot_is_undone_by_its_guardian(
    qemu: FakeQemu, memory: int, tmp_path: Path, name: str, where: str
) -> None:
    done = killed(qemu, memory, tmp_path, "snapshot", where, **WAYS[name][1])
    assert done.returncode == -signal.SIGKILL
    assert qemu.whole
    assert not right(tmp_path / "snap", memory)
    assert not (tmp_path / "qmp.journal").exists()


@pytest.mark.parametrize(("name", "where"), PLACES)
def test_snapshot_without_its_guardian_ends_well_or_is_undone(
    qemu: FakeQemu, memory: int, tmp_path: Path, name: str, where: str
) -> None:
    done = killed(qemu, memory, tmp_path, "guardian", where, **WAYS[name][1])
    assert qemu.whole
    assert right(tmp_path / "snap", memory) == (done.returncode == 0)
    assert not (tmp_path / "qmp.journal").exists()


@pytest.mark.parametrize(("name", "where"), PLACES)
def test_killed_with_its_guardian_the_journal_has_it_all(
    qemu: FakeQemu, memory: int, tmp_path: Path, name: str, where: str
) -> None:
    killed(qemu, memory, tmp_path, "both", where, **WAYS[name][1])
    if not qemu.whole:
        assert (tmp_path / "qmp.journal").exists()
    if (tmp_path / "qmp.journal").exists():
        assert undo_file(tmp_path / "qmp.journal") == []
    assert qemu.whole
    assert not right(tmp_path / "snap", memory)


@pytest.mark.parametrize("victim", ["snapshot", "both"])
@pytest.mark.parametrize("where", [step.name for step in way(Options(quit=True))])
def test_machine_that_was_to_end_is_never_two(
    qemu: FakeQemu, memory: int, tmp_path: Path, victim: str, where: str
) -> None:
    killed(qemu, memory, tmp_path, victim, where, quit=True)
    journal = JournalFile(tmp_path / "qmp.journal")
    entry = journal.read()
    if entry is not None and entry.over:
        assert qemu.status == "paused"
        assert right(tmp_path / "snap", memory)
        assert undo_file(journal.path, decision="commit") == []
        assert qemu.status == "ended"
        return
    assert where != "end"
    if entry is not None:
        assert undo_file(journal.path) == []
    assert qemu.whole


@contextlib.contextmanager
def receiver(folder: Path, where: str = "") -> Iterator[subprocess.Popen[str]]:
    """Run the destination, which is killed at *where*."""
    words = [sys.executable, "-c", RECEIVER, str(folder / "link"), str(folder / "there"), where]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (folder / "link").exists():
            assert process.poll() is None
            time.sleep(0.01)
        yield process


def one_place(qemu: FakeQemu, folder: Path, fd: int, there: subprocess.Popen[str]) -> None:
    """Check that the guest runs at one place, or at none with instructions that work."""
    out, words = there.communicate(timeout=60)
    assert "Traceback" not in words, words
    runs = "runs" in out
    entry = JournalFile(folder / "qmp.journal").read()
    if entry is not None and entry.gone:
        assert qemu.status == "paused"
        assert right(folder / "there", fd)
        # what is printed works, either way
        if runs:
            assert undo_file(folder / "qmp.journal", decision="commit") == []
            assert qemu.status == "ended"
        else:
            assert undo_file(folder / "qmp.journal", decision="abort") == []
            assert qemu.whole
        return
    if entry is not None:
        assert undo_file(folder / "qmp.journal") == []
    if qemu.status == "ended":
        assert runs
    else:
        assert not runs
        assert qemu.whole


@pytest.mark.parametrize("victim", ["snapshot", "guardian", "both"])
@pytest.mark.parametrize("where", ["unplug", *(step.name for step in MOVE if step not in COLD)])
def test_killed_sender_leaves_one(
    qemu: FakeQemu, memory: int, tmp_path: Path, victim: str, where: str
) -> None:
    with receiver(tmp_path) as there:
        killed(qemu, memory, tmp_path, victim, where, move=True, quit=True)
        one_place(qemu, tmp_path, memory, there)


@pytest.mark.parametrize("where", ["receiving", "verified", "committed", "runs"])
def test_killed_receiver_leaves_one(
    qemu: FakeQemu, memory: int, tmp_path: Path, where: str
) -> None:
    with receiver(tmp_path, where) as there:
        done = killed(qemu, memory, tmp_path, "", "", move=True, quit=True)
        assert done.returncode == 1
        one_place(qemu, tmp_path, memory, there)
    marked = (tmp_path / "there" / PENDING_FILE).exists()
    assert marked == (where == "verified")


@pytest.mark.parametrize(("name", "where"), [p for p in PLACES if p[0] == "cold"])
def test_snapshot_of_a_qemu_that_dies_is_refused(
    qemu: FakeQemu, memory: int, tmp_path: Path, name: str, where: str
) -> None:
    """Whatever it has written; what was complete before stays."""

    class Ends(Observer):
        def step(self, step: str) -> None:
            if step == where:
                qemu.dead = True

    ram = RamFile(os.dup(memory), SIZE, [(0, SIZE, 0)], qemu.host)
    with (
        GuestSource([ram], None, "", None, None) as source,
        QemuVm(tmp_path / "qmp") as vm,
    ):
        run = Run(vm, source, DirectoryStore(tmp_path / "snap"), observer=Ends())
        try:
            take(run)
        except UsageError:
            assert not (tmp_path / "snap").exists()
        else:
            assert where == "finish"
            assert right(tmp_path / "snap", memory)
