# SPDX-License-Identifier: Apache-2.0
"""The steps of a snapshot, with a made-up QEMU: their order, and the way back from each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.memory import memfd
from tests.fakes.qemu_monitor import BALLOON, FakeQemu, event

from vballoon.errors import UsageError
from vballoon.memory import PageRanges
from vballoon.snapshot.journal import Entry, Journal
from vballoon.snapshot.memmap import FreeMemory, VerificationRefused
from vballoon.snapshot.qmp_vm import QemuVm
from vballoon.snapshot.recovery import undo
from vballoon.snapshot.run import Observer, Options, Run, Step
from vballoon.snapshot.source import GuestSource, RamFile
from vballoon.snapshot.state import as_migration
from vballoon.snapshot.store import DirectoryStore, open_snapshot
from vballoon.snapshot.take import COLD, LIVE, steps_table, take
from vballoon_spec.snapshot import StateKind

PAGE = 4096
SIZE = 64 * PAGE


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
    """32 pages of data, then 32 of hole; the guest says that pages 8 to 16 are free."""
    fd = memfd(SIZE)
    os.pwrite(fd, os.urandom(32 * PAGE), 0)
    ram = RamFile(fd, SIZE, [(0, SIZE, 0)], qemu.map_memory(fd))
    with GuestSource([ram], None, "no module", None, None) as made:
        yield made


def free(source: GuestSource) -> FreeMemory:
    return FreeMemory(PageRanges([8, 30], [16, 40]), 2, 18, 0)


def make(vm: QemuVm, source: GuestSource, folder: Path, **more: Any) -> Run:
    return Run(vm, source, DirectoryStore(folder / "snap"), free_memory=free, **more)


def test_leaves_out_holes_and_free_pages(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    manifest = take(make(vm, source, tmp_path))
    assert manifest == open_snapshot(tmp_path / "snap") or manifest.extra
    assert manifest.memory[0].data == (32 - 8 - 2) * PAGE
    assert manifest.left_out == {"holes": 32 * PAGE, "verified": 10 * PAGE}
    copied = (tmp_path / "snap" / "mem.ram").read_bytes()
    data = os.pread(source.files[0].fd, SIZE, 0)
    assert copied[: 8 * PAGE] == data[: 8 * PAGE]
    assert copied[8 * PAGE : 16 * PAGE] == bytes(8 * PAGE)
    assert copied[16 * PAGE : 30 * PAGE] == data[16 * PAGE : 30 * PAGE]
    assert copied[30 * PAGE :] == bytes(34 * PAGE)
    assert qemu.whole
    assert manifest.balloon == {
        "device": BALLOON,
        "chardev": {"id": "c0", "path": str(qemu.socket)},
        "target": None,
    }


def test_steps_come_in_this_order(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    seen = []

    class Steps(Observer):
        def step(self, name: str) -> None:
            seen.append(name)

    take(make(vm, source, tmp_path, observer=Steps()))
    assert seen == [
        "look", "guard", "unplug", "prepare", "stop", "state", "verify", "copy", "check", "resume",
        "plug", "finish", "done",
    ]  # fmt: skip
    order = [
        n
        for n in qemu.log
        if n
        in ("device_del", "stop", "xen-save-devices-state", "cont", "chardev-remove", "device_add")
    ]
    assert order == [
        "device_del",
        "stop",
        "xen-save-devices-state",
        "cont",
        "chardev-remove",
        "device_add",
    ]


def test_free_memory_is_asked_of_a_stopped_guest_only(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    states = []

    def watching(source: GuestSource) -> FreeMemory:
        states.append(qemu.status)
        return free(source)

    take(Run(vm, source, DirectoryStore(tmp_path / "snap"), free_memory=watching))
    assert states == ["paused"]


def test_refused_verification_copies_all_data(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    def refused(source: GuestSource) -> FreeMemory:
        raise VerificationRefused("another kernel")

    manifest = take(Run(vm, source, DirectoryStore(tmp_path / "snap"), free_memory=refused))
    assert (manifest.verification, manifest.memory[0].data) == ("another kernel", 32 * PAGE)
    other = take(Run(vm, source, DirectoryStore(tmp_path / "other")))
    assert (other.verification, other.memory[0].data) == ("no module", 32 * PAGE)


def test_poison_is_a_reason_to_copy(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    source.poison = 0xAAAAAAAA
    source.layout = object()  # type: ignore[assignment]
    manifest = take(Run(vm, source, DirectoryStore(tmp_path / "snap")))
    assert "0xaaaaaaaa" in manifest.verification
    assert manifest.memory[0].data == 32 * PAGE


STEPS = ("device_del", "stop", "add-fd", "xen-save-devices-state", "cont", "chardev-add",
         "device_add", "query-memdev", "x-query-ramblock", "qom-get")  # fmt: skip


@pytest.mark.parametrize("command", STEPS)
def test_way_back_from_a_refused_command(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path, command: str
) -> None:
    """Refused once: everything is undone."""

    def once(name: str) -> None:
        qemu.refuse = {command} if name == command and qemu.log.count(command) == 1 else set()

    qemu.on = once
    with pytest.raises(UsageError, match="refused"):
        take(make(vm, source, tmp_path))
    assert qemu.whole
    assert qemu.chardevs == {"c0": str(qemu.socket)}
    assert not (tmp_path / "snap").exists()


@pytest.mark.parametrize("command", ["migrate", "query-migrate", "migrate-set-capabilities"])
def test_way_back_from_a_refused_migration(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path, command: str
) -> None:
    name_the_backend(qemu, source)

    def once(name: str) -> None:
        qemu.refuse = {command} if name == command and qemu.log.count(command) == 1 else set()

    qemu.on = once
    with pytest.raises(UsageError, match="refused"):
        take(make(vm, source, tmp_path))
    assert qemu.whole


def test_failed_migration_is_told_in_qemus_words(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    name_the_backend(qemu, source)

    def failing(name: str) -> None:
        if name == "query-migrate":
            qemu.migration = {"status": "failed", "error-desc": "no luck"}

    qemu.on = failing
    with pytest.raises(UsageError, match="no luck"):
        take(make(vm, source, tmp_path))
    assert qemu.whole


def name_the_backend(qemu: FakeQemu, source: GuestSource) -> None:
    qemu.backend_type = "memory-backend-file"
    qemu.backend_path = f"/proc/self/fd/{source.files[0].fd}"


def test_named_file_is_saved_by_migration(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    name_the_backend(qemu, source)
    manifest = take(make(vm, source, tmp_path))
    assert manifest.state.kind is StateKind.IGNORE_SHARED
    assert (tmp_path / "snap" / "state").read_bytes() == b"device state"
    assert qemu.whole


def test_capability_of_another_kind_of_migration_is_refused(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    name_the_backend(qemu, source)
    qemu.mapped_ram = True
    with pytest.raises(UsageError, match="mapped-ram"):
        take(make(vm, source, tmp_path))
    assert qemu.whole
    assert "device_del" not in qemu.log


def test_state_of_a_memfds_machine_becomes_a_migrations_stream(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    manifest = take(make(vm, source, tmp_path))
    assert manifest.state.kind is StateKind.DEVICES_ONLY
    assert (tmp_path / "snap" / "state").read_bytes() == (
        b"QEVM\0\0\0\3\7\0\0\0\x0bpc-q35-11.1device state\6\0\0\0\2{}"
    )
    for strange in (b"", b"device state", b"QEVM\0\0\0\3\7"):
        with pytest.raises(UsageError, match="unknown format"):
            as_migration(strange, "pc")


def test_memfd_with_other_writable_ram_is_refused(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    qemu.graphics = True
    with pytest.raises(UsageError, match=r"vga\.vram"):
        take(make(vm, source, tmp_path))
    assert qemu.whole
    assert "device_del" not in qemu.log


def test_file_that_is_no_backends_is_refused(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    qemu.host += PAGE
    with pytest.raises(UsageError, match="memory backend mem"):
        take(make(vm, source, tmp_path))
    qemu.host -= PAGE
    qemu.size *= 2
    with pytest.raises(UsageError, match="memory backend mem"):
        take(make(vm, source, tmp_path))
    assert "device_del" not in qemu.log


def test_guest_that_does_not_let_go(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vballoon.snapshot.recovery.UNPLUG_SECONDS", 0.1)
    qemu.lets_go = False
    with pytest.raises(UsageError, match="did not release"):
        take(make(vm, source, tmp_path, options=Options(unplug_seconds=0.1)))
    assert qemu.whole
    assert "stop" not in qemu.log


def test_guest_that_lets_go_late_gets_its_balloon_back(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    qemu.lets_go = False

    def late(name: str) -> None:
        if name == "qom-list" and qemu.log.count("qom-list") > 14:
            qemu.device = None if "device_add" not in qemu.log else qemu.device

    qemu.on = late
    with pytest.raises(UsageError, match="did not release"):
        take(make(vm, source, tmp_path, options=Options(unplug_seconds=0.05)))
    assert qemu.whole
    assert "device_add" in qemu.log


def test_disk_that_is_full(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vballoon.snapshot.store.copy_extents", full)
    with pytest.raises(UsageError, match="No space left"):
        take(make(vm, source, tmp_path))
    assert qemu.whole
    assert not (tmp_path / "snap").exists()


def test_quit_comes_after_the_manifest(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    there = []
    qemu.on = lambda name: there.append((name, (tmp_path / "snap" / "manifest.json").exists()))
    take(make(vm, source, tmp_path, options=Options(quit=True)))
    assert ("quit", True) in there
    assert "cont" not in qemu.log


def test_snapshot_outlives_a_qemu_that_does_not_answer_its_end(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    """It is the only one that is left of the machine."""
    qemu.mute = True
    take(make(vm, source, tmp_path, options=Options(quit=True)))
    assert qemu.status == "ended"
    open_snapshot(tmp_path / "snap")


def test_interrupted_when_all_is_written_the_snapshot_stays(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    class Impatient(Observer):
        def step(self, name: str) -> None:
            if name == "end":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(make(vm, source, tmp_path, options=Options(quit=True), observer=Impatient()))
    open_snapshot(tmp_path / "snap")
    assert "cont" not in qemu.log


def test_nothing_is_believed_of_a_machine_that_was_reset(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    """What the kernel before it knew may still lie in memory."""

    def reset(name: str) -> None:
        if name == "stop":
            qemu.events.append(event("RESET", guest=True))

    qemu.on = reset
    manifest = take(make(vm, source, tmp_path))
    assert (manifest.verification, manifest.left_out["verified"]) == (
        "the machine was reset meanwhile",
        0,
    )
    assert manifest.memory[0].data == 32 * PAGE


def test_memory_that_came_meanwhile_is_not_forgotten(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    """QEMU would leave it out of its state, and so would we."""

    def hot_add(name: str) -> None:
        if name == "device_del":
            qemu.more_memory = [{"id": "dimm", "size": 1 << 27, "share": True}]

    qemu.on = hot_add
    with pytest.raises(UsageError, match="changed meanwhile"):
        take(make(vm, source, tmp_path))
    assert qemu.whole


def test_machine_that_qemu_cannot_save_is_refused(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    """xen-save-devices-state would write the state of all but the device in question."""
    qemu.blocked = ["non-migratable device: 0000:00:04.0/ivshmem-plain"]
    with pytest.raises(UsageError, match="ivshmem"):
        take(make(vm, source, tmp_path))
    assert qemu.whole
    assert not (tmp_path / "snap").exists()


def test_machine_that_stands_still_is_refused(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    qemu.status = "paused"
    with pytest.raises(UsageError, match="must be running"):
        take(make(vm, source, tmp_path))
    assert qemu.status == "paused"


def test_entry_survives_the_line(tmp_path: Path) -> None:
    entry = Entry("/qmp", "/machine/x", dict(BALLOON), {"id": "c", "path": "p"}, True, True, True)
    assert Entry.loads(entry.dumps()) == entry


@pytest.mark.parametrize(
    ("entry", "commands"),
    [
        (Entry("q"), set()),
        (Entry("q", stop=True), {"query-status", "cont"}),
        (Entry("q", migrate=True), {"query-migrate", "query-migrate-capabilities"}),
    ],
)
def test_going_back_does_no_more_than_the_note_says(
    qemu: FakeQemu, vm: QemuVm, entry: Entry, commands: set[str]
) -> None:
    qemu.status = "paused"
    before = len(qemu.log)
    assert undo(vm, entry) == ([], Entry("q"))
    assert set(qemu.log[before:]) == commands


def test_trouble_on_the_way_back_is_told_and_the_rest_is_done(qemu: FakeQemu, vm: QemuVm) -> None:
    qemu.status, qemu.device, qemu.refuse = "paused", None, {"cont"}
    entry = Entry("q", "/machine/peripheral/balloon0", dict(BALLOON), None, unplug=True, stop=True)
    troubles, left = undo(vm, entry)
    assert troubles == ["the guest is still stopped: QEMU: cont is refused"]
    assert (left.stop, left.unplug) == (True, False)
    assert qemu.device == BALLOON


@pytest.mark.parametrize(("name", "way"), [("COLD", COLD), ("LIVE", LIVE)])
def test_documentation_has_the_steps(name: str, way: tuple[Step, ...]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    _, _, after = text.partition(f"<!-- steps: {name} -->\n\n")
    assert after.startswith(steps_table(way) + "\n")


def test_journal_is_written_ahead_and_cleared_after() -> None:
    written: list[Entry] = []
    journal = Journal(Entry("q"), written.append)
    with journal.doing(stop=True):
        assert written[-1].stop
    with pytest.raises(ZeroDivisionError), journal.doing(unplug=True):
        raise ZeroDivisionError
    assert journal.entry == Entry("q", stop=True, unplug=True)
    with journal.undoing("stop"):
        assert written[-1].stop
    assert not written[-1].stop
    with pytest.raises(ZeroDivisionError), journal.undoing("unplug"):
        raise ZeroDivisionError
    assert journal.entry.unplug


def test_entry_that_a_sink_did_not_take_is_not_acted_upon() -> None:
    def broken(entry: Entry) -> None:
        raise BrokenPipeError

    journal, reached = Journal(Entry("q"), broken), False
    with pytest.raises(BrokenPipeError), journal.doing(stop=True):
        reached = True
    assert not reached
    assert journal.entry == Entry("q")


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b'{"qmp": "q", "more": 1}\n', b"\xff\n"])
def test_strange_entry_is_refused(line: bytes) -> None:
    with pytest.raises(UsageError, match="not an entry"):
        Entry.loads(line)


@pytest.mark.parametrize("host_known", [True, False], ids=["vhost-user", "vfio-user"])
def test_control_socket_of_another_vm_is_refused(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path, host_known: bool
) -> None:
    """Its memory has the same size, and may have the same address."""
    other = memfd(SIZE)
    os.pwrite(other, os.urandom(PAGE), 0)
    ram = RamFile(other, SIZE, [(0, SIZE, 0)], qemu.host if host_known else 0)
    with (
        GuestSource([ram], None, "no module", None, None) as foreign,
        pytest.raises(UsageError, match="another VM"),
    ):
        take(make(vm, foreign, tmp_path))
    assert qemu.whole
    assert "device_del" not in qemu.log


def test_memory_without_a_name_is_known_over_vfio_user(
    qemu: FakeQemu, vm: QemuVm, tmp_path: Path
) -> None:
    """As after a restore: QEMU has the file, which has no name any more."""
    path = tmp_path / "ram"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, SIZE)
    qemu.map_memory(fd)
    path.unlink()
    qemu.backend_type, qemu.backend_path = "memory-backend-file", str(path)
    with GuestSource([RamFile(fd, SIZE, [(0, SIZE, 0)], 0)], None, "", None, None) as source:
        manifest = take(Run(vm, source, DirectoryStore(tmp_path / "snap")))
    assert manifest.state.kind is StateKind.IGNORE_SHARED
    assert qemu.whole


def test_process_that_is_not_qemu_is_refused(
    qemu: FakeQemu, vm: QemuVm, source: GuestSource, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"--qemu-pid|another VM"):
        take(make(vm, source, tmp_path, options=Options(qemu_pid=1)))
    with pytest.raises(UsageError, match="--qemu-pid"):
        take(make(vm, source, tmp_path, options=Options(qemu_pid=1 << 22)))
    assert "device_del" not in qemu.log
