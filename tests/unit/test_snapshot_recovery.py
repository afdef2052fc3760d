# SPDX-License-Identifier: Apache-2.0
"""Somebody else resumes the guest, two snapshots at once, a late guest, a killed guardian."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.memory import memfd
from tests.fakes.qemu_monitor import BALLOON, FakeQemu, event

from vballoon.errors import UsageError
from vballoon.snapshot import recovery
from vballoon.snapshot.device import BalloonDevice, resolve_socket
from vballoon.snapshot.journal import Entry, JournalFile
from vballoon.snapshot.lock import lock_vm
from vballoon.snapshot.process import Process, identity
from vballoon.snapshot.qmp_vm import QemuVm
from vballoon.snapshot.recovery import GONE, OVER, Guardian, undo_file
from vballoon.snapshot.run import Observer, Options, Run
from vballoon.snapshot.source import GuestSource, RamFile
from vballoon.snapshot.store import DirectoryStore, open_snapshot
from vballoon.snapshot.take import take

PAGE = 4096
SIZE = 16 * PAGE
ME = Process(os.getpid())


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[FakeQemu]:
    with FakeQemu(tmp_path / "qmp", SIZE) as served:
        yield served


@pytest.fixture
def vm(qemu: FakeQemu, tmp_path: Path) -> Iterator[QemuVm]:
    with QemuVm(tmp_path / "qmp") as connected:
        yield connected


@pytest.fixture
def source(qemu: FakeQemu) -> Iterator[GuestSource]:
    fd = memfd(SIZE)
    os.pwrite(fd, os.urandom(SIZE), 0)
    ram = RamFile(fd, SIZE, [(0, SIZE, 0)], qemu.map_memory(fd))
    with GuestSource([ram], None, "no module", None, None) as made:
        yield made


def make(vm: QemuVm, source: GuestSource, folder: Path, **more: Any) -> Run:
    return Run(vm, source, DirectoryStore(folder / "snap"), **more)


class At(Observer):
    """Does something when a step begins."""

    def __init__(self, name: str, action: Any) -> None:
        self.name, self.action, self.said = name, action, list[str]()

    def step(self, name: str) -> None:
        if name == self.name:
            self.action()

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("stays", [True, False], ids=["runs on", "is stopped again"])
@pytest.mark.parametrize("quit", [False, True], ids=["resume", "quit"])
def test_copy_of_a_guest_that_somebody_resumed_is_refused(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path, stays: bool, quit: bool
) -> None:
    """Its pages would be of several moments."""

    def resumed() -> None:
        qemu.status = "running" if stays else "paused"
        qemu.events.append(event("RESUME"))

    run = make(vm, source, tmp_path, options=Options(quit=quit), observer=At("copy", resumed))
    with pytest.raises(UsageError, match="somebody else has resumed"):
        take(run)
    assert qemu.whole
    assert "quit" not in qemu.log
    assert not (tmp_path / "snap").exists()


def test_guest_that_was_resumed_before_the_snapshot_is_no_matter(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    qemu.events.append(event("RESUME"))
    take(make(vm, source, tmp_path))
    open_snapshot(tmp_path / "snap")


def test_machine_that_is_to_end_and_runs_again_is_not_ended(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody resumes it while the manifest is written."""
    finish = DirectoryStore.finish

    def slow(self: DirectoryStore, manifest: Any) -> None:
        finish(self, manifest)
        qemu.status = "running"
        qemu.events.append(event("RESUME"))

    monkeypatch.setattr(DirectoryStore, "finish", slow)
    with pytest.raises(UsageError, match="somebody else has resumed"):
        take(make(vm, source, tmp_path, options=Options(quit=True)))
    assert qemu.whole
    assert not (tmp_path / "snap").exists()


def test_two_snapshots_at_once_are_refused(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    lock = lock_vm(ME, identity(source.files[0].fd))
    with pytest.raises(UsageError, match="another snapshot"):
        take(make(vm, source, tmp_path))
    os.close(lock)
    assert "device_del" not in qemu.log
    take(make(vm, source, tmp_path))
    os.close(lock_vm(ME, identity(source.files[0].fd)))  # it has not kept it


def test_guardian_keeps_the_lock(source: GuestSource) -> None:
    memory = identity(source.files[0].fd)
    lock = lock_vm(ME, memory)
    guardian = Guardian(lock)
    os.close(lock)
    with pytest.raises(UsageError, match="another snapshot"):
        lock_vm(ME, memory)
    guardian.dismiss()
    os.close(lock_vm(ME, memory))


def wait_for(done: Any) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_guest_that_releases_its_balloon_late_gets_it_back_from_the_guardian(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "UNPLUG_SECONDS", 0.05)
    qemu.lets_go = False
    seen = At("", None)
    with pytest.raises(UsageError, match="did not release"):
        take(make(vm, source, tmp_path, options=Options(unplug_seconds=0.05), observer=seen))
    assert any("has not released the balloon yet" in text for text in seen.said)
    assert any("waits for the guest" in text for text in seen.said)
    journal = JournalFile(tmp_path / "qmp.journal")
    entry = journal.read()
    assert entry is not None
    assert (entry.unplug, entry.stop) == (True, False)
    with pytest.raises(UsageError, match="another snapshot"):
        undo_file(journal.path)  # the guardian is at work
    vm.close()
    qemu.device = None
    wait_for(lambda: journal.read() is None)
    assert qemu.whole
    assert "device_add" in qemu.log


def left_behind(source: GuestSource, folder: Path, qemu: FakeQemu, **flags: bool) -> Entry:
    """Write the journal of a snapshot that was killed together with its guardian."""
    entry = Entry(
        str(folder / "qmp"),
        "/machine/peripheral/balloon0",
        dict(BALLOON),
        {"id": "c0", "path": str(qemu.socket)},
        qemu=ME.name,
        memory=identity(source.files[0].fd),
        file=str(folder / "qmp.journal"),
    )
    entry = replace(entry, **flags)  # type: ignore[arg-type]
    JournalFile(folder / "qmp.journal").write(entry)
    return entry


def test_killed_with_its_guardian_is_undone_by_hand(
    qemu: FakeQemu, source: GuestSource, tmp_path: Path
) -> None:
    left_behind(source, tmp_path, qemu, unplug=True, stop=True, migrate=True)
    qemu.status, qemu.device, qemu.capability = "postmigrate", None, True
    assert undo_file(tmp_path / "qmp.journal") == []
    assert qemu.whole
    assert not (tmp_path / "qmp.journal").exists()
    with pytest.raises(UsageError, match="no snapshot has to be undone"):
        undo_file(tmp_path / "qmp.journal")


def test_next_snapshot_offers_to_undo(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    left_behind(source, tmp_path, qemu, stop=True)
    with pytest.raises(UsageError, match="--undo"):
        take(make(vm, source, tmp_path))
    assert qemu.whole
    assert "device_del" not in qemu.log


def test_what_could_not_be_undone_stays_in_the_journal(
    qemu: FakeQemu, source: GuestSource, tmp_path: Path
) -> None:
    left_behind(source, tmp_path, qemu, unplug=True, stop=True)
    qemu.status, qemu.device, qemu.refuse = "paused", None, {"device_add"}
    assert undo_file(tmp_path / "qmp.journal") == [
        "the balloon is not plugged in again: QEMU: device_add is refused"
    ]
    entry = JournalFile(tmp_path / "qmp.journal").read()
    assert entry is not None
    assert (entry.stop, entry.unplug) == (False, True)
    qemu.refuse = set()
    assert undo_file(tmp_path / "qmp.journal") == []
    assert qemu.whole


def test_journal_of_a_qemu_that_has_ended_is_of_no_use(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    entry = left_behind(source, tmp_path, qemu, stop=True)
    JournalFile(tmp_path / "qmp.journal").write(replace(entry, qemu="1:1"))
    take(make(vm, source, tmp_path))
    assert qemu.whole
    JournalFile(tmp_path / "qmp.journal").write(replace(entry, qemu="1:1"))
    assert undo_file(tmp_path / "qmp.journal") == [
        "QEMU has ended since, so there is nothing to undo"
    ]
    assert not (tmp_path / "qmp.journal").exists()


@pytest.mark.parametrize(("flag", "words"), [("gone", GONE), ("over", OVER)])
def test_machine_that_may_run_elsewhere_waits_for_a_decision(
    qemu: FakeQemu, source: GuestSource, tmp_path: Path, flag: str, words: str
) -> None:
    journal = tmp_path / "qmp.journal"
    left_behind(source, tmp_path, qemu, unplug=True, stop=True, **{flag: True})
    qemu.status, qemu.device = "paused", None
    assert undo_file(journal) == [words]
    assert qemu.status == "paused"
    assert undo_file(journal, decision="abort") == []
    assert qemu.whole
    left_behind(source, tmp_path, qemu, unplug=True, stop=True, **{flag: True})
    qemu.status, qemu.device = "paused", None
    assert undo_file(journal, decision="commit") == []
    assert qemu.status == "ended"
    assert not journal.exists()


def test_nothing_is_committed_without_a_complete_snapshot(
    qemu: FakeQemu, source: GuestSource, tmp_path: Path
) -> None:
    left_behind(source, tmp_path, qemu, stop=True)
    with pytest.raises(UsageError, match="nothing to commit"):
        undo_file(tmp_path / "qmp.journal", decision="commit")
    assert qemu.status == "running"


def test_guardian_does_not_resume_what_may_run_elsewhere(
    qemu: FakeQemu, source: GuestSource, tmp_path: Path
) -> None:
    entry = left_behind(source, tmp_path, qemu, stop=True, gone=True)
    qemu.status = "paused"
    done = subprocess.run(
        [sys.executable, "-m", "vballoon.snapshot.guardian"],
        input=entry.dumps(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    assert GONE.encode() in done.stderr
    assert qemu.status == "paused"
    assert JournalFile(tmp_path / "qmp.journal").read() == entry


def test_journal_that_cannot_be_written_is_told_before_anything_is_touched(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    options = Options(journal=str(tmp_path / "nowhere" / "journal"))
    with pytest.raises(UsageError, match="journal"):
        take(make(vm, source, tmp_path, options=options))
    assert qemu.whole
    assert "device_del" not in qemu.log


def test_parent_folder_is_synced(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, sync = [], os.fsync

    def noting(fd: int) -> None:
        synced.append(identity(fd))
        sync(fd)

    monkeypatch.setattr(os, "fsync", noting)
    take(make(vm, source, tmp_path))
    names = [tmp_path / "snap", tmp_path]
    assert synced[-2:] == [(p.stat().st_dev, p.stat().st_ino) for p in names]


def test_socket_of_the_backend_is_found_before_the_unplug(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU reports the path that the back-end has bound, relative to the back-end's folder."""
    monkeypatch.chdir(tmp_path)
    qemu.chardevs = {"c0": "balloon.sock"}
    manifest = take(make(vm, source, tmp_path))
    assert manifest.balloon["chardev"] == {"id": "c0", "path": str(tmp_path / "balloon.sock")}
    assert qemu.chardevs == {"c0": str(tmp_path / "balloon.sock")}


def test_socket_that_is_nowhere_is_told_before_the_unplug(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    for path in ("balloon.sock", str(tmp_path / "none"), str(tmp_path)):
        qemu.chardevs = {"c0": path}
        with pytest.raises(UsageError, match="--device-socket"):
            take(make(vm, source, tmp_path))
    assert "device_del" not in qemu.log
    options = Options(device_socket=str(qemu.socket))
    assert take(make(vm, source, tmp_path, options=options)).balloon["chardev"] == {
        "id": "c0",
        "path": str(qemu.socket),
    }


def test_socket_of_a_vfio_user_device_is_resolved(qemu: FakeQemu, tmp_path: Path) -> None:
    arguments = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": "balloon.sock"}}
    found = resolve_socket(BalloonDevice("/x", arguments, None), None, [Path("/"), tmp_path])
    assert found.arguments["socket"] == {"type": "unix", "path": str(qemu.socket)}
