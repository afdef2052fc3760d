# SPDX-License-Identifier: Apache-2.0
"""A snapshot's directory is whole, or restore refuses it; and what a command line becomes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.memory import memfd

from vballoon.errors import UsageError
from vballoon.memory import ByteRanges
from vballoon.snapshot.command import rewrite
from vballoon.snapshot.restore import RamPlace, Warden, balloon_arguments
from vballoon.snapshot.store import DirectoryStore, open_snapshot, ram_name
from vballoon_spec.snapshot import (
    MemoryFile,
    SnapshotManifest,
    SnapshotManifestError,
    StateFile,
    StateKind,
)

PAGE = 4096
DEVICE = {
    "driver": "vhost-user-test-device-pci",
    "id": "balloon0",
    "bus": "rp0",
    "chardev": "c0",
    "virtio-id": 5,
}


def manifest_of(store: DirectoryStore, kind: StateKind = StateKind.IGNORE_SHARED):
    size, state, memory = store.digests()
    return SnapshotManifest(
        created_ns=1,
        qemu={"version": "11.1.3", "machine": "pc-q35-11.1", "target": "x86_64"},
        state=StateFile(kind, size, state),
        memory=(MemoryFile("mem", "mem.ram", 64 * PAGE, 2 * PAGE, memory[0]),),
        left_out={"holes": 62 * PAGE, "verified": 0},
        verification="",
        balloon={"device": dict(DEVICE), "chardev": {"id": "c0", "path": "/run/b.sock"}},
    )


def parts(store: DirectoryStore) -> None:
    fd = store.open_state()
    os.write(fd, b"device state")
    os.close(fd)
    ram = memfd(64 * PAGE)
    os.pwrite(ram, b"x" * 64 * PAGE, 0)
    wanted = ByteRanges([PAGE, 9 * PAGE], [2 * PAGE, 10 * PAGE])
    assert store.copy(0, "mem.ram", ram, 64 * PAGE, wanted, lambda done: None) == 2 * PAGE
    os.close(ram)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    store = DirectoryStore(tmp_path / "snap")
    parts(store)
    store.finish(manifest_of(store))
    return tmp_path / "snap"


def test_whole_snapshot_is_read_as_it_was_written(whole: Path) -> None:
    manifest = open_snapshot(whole)
    assert manifest.memory[0].data == 2 * PAGE
    assert manifest.balloon["device"] == DEVICE
    assert sorted(p.name for p in whole.iterdir()) == ["manifest.json", "mem.ram", "state"]
    assert whole.stat().st_mode & 0o077 == 0  # it holds the guest's secrets
    assert (whole / "mem.ram").stat().st_blocks * 512 <= 4 * PAGE


def test_directory_without_a_manifest_is_refused(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "snap")
    parts(store)
    with pytest.raises(UsageError, match="not a whole snapshot"):
        open_snapshot(tmp_path / "snap")


def test_discarded_snapshot_leaves_nothing(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "snap")
    parts(store)
    store.finish(manifest_of(store))
    store.discard()
    store.discard()
    assert list(tmp_path.iterdir()) == []


def test_directory_that_was_there_stays(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    parts(store)
    store.discard()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "other").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        DirectoryStore(tmp_path)
    with pytest.raises(UsageError, match="No such file"):
        DirectoryStore(tmp_path / "a" / "b")


DAMAGES = {
    "state changed": lambda d: (d / "state").write_bytes(b"device stat3"),
    "state longer": lambda d: (d / "state").write_bytes(b"device state "),
    "state missing": lambda d: (d / "state").unlink(),
    "memory changed": lambda d: patch(d / "mem.ram", 9 * PAGE, b"y"),
    "memory in a hole": lambda d: patch(d / "mem.ram", 30 * PAGE, b"y"),
    "memory shorter": lambda d: os.truncate(d / "mem.ram", 63 * PAGE),
    "memory missing": lambda d: (d / "mem.ram").unlink(),
    "manifest cut": lambda d: os.truncate(d / "manifest.json", 100),
    "manifest empty": lambda d: (d / "manifest.json").write_text(""),
    "manifest not text": lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "manifest a directory": lambda d: (
        (d / "manifest.json").unlink(),
        (d / "manifest.json").mkdir(),
    ),
    "manifest a pipe": lambda d: ((d / "manifest.json").unlink(), os.mkfifo(d / "manifest.json")),
    "state a link": lambda d: linked(d / "state"),
    "memory a link": lambda d: linked(d / "mem.ram"),
}


def linked(path: Path) -> None:
    """Move the file and replace it by a link: a guest must not be able to read through links."""
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def patch(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_refused(whole: Path, damage: Any) -> None:
    damage(whole)
    with pytest.raises(UsageError):
        open_snapshot(whole)


FIELDS = {
    "format": "other", "version": 2, "created_ns": "now", "qemu": {"version": "1"},
    "state": {}, "memory": [], "left_out": 3, "verification": None, "balloon": {"device": {}},
    "state.kind": "guess", "state.bytes": -1, "state.sha256": "0", "state.file": "../state",
    "memory.0.id": "a,b", "memory.0.file": "/etc/passwd", "memory.0.size": 4095,
    "memory.0.data": 1 << 62, "memory.0.sha256": "g" * 64, "balloon.chardev": {"id": "c0"},
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_checked(whole: Path, field: str) -> None:
    data = json.loads((whole / "manifest.json").read_text())
    *way, last = field.split(".")
    place = data
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    place[last] = FIELDS[field]
    with pytest.raises(SnapshotManifestError):
        SnapshotManifest.loads(json.dumps(data))
    del place[last]
    if field != "balloon.chardev":
        with pytest.raises(SnapshotManifestError):
            SnapshotManifest.loads(json.dumps(data))


def test_two_memories_of_one_name_are_refused(whole: Path) -> None:
    data = json.loads((whole / "manifest.json").read_text())
    data["memory"] *= 2
    with pytest.raises(SnapshotManifestError, match="twice"):
        SnapshotManifest.loads(json.dumps(data))


def test_names_of_backends_are_made_names_of_files() -> None:
    assert ram_name("mem0") == "mem0.ram"
    assert "/" not in ram_name("../../x")


COMMAND = [
    "qemu-system-x86_64", "-enable-kvm", "-m", "1G",
    "-object", "memory-backend-memfd,id=mem,size=1G,share=on,policy=bind,host-nodes=0",
    "-machine", "q35,memory-backend=mem",
    "-object", '{"qom-type":"rng-random","id":"rng"}',
    "-chardev", "socket,id=c0,path=/run/b.sock", "-chardev", "stdio,id=c1",
    "-device", "pcie-root-port,id=rp0",
    "--device", "vhost-user-test-device-pci,id=balloon0,chardev=c0,virtio-id=5",
    "-device", "vhost-user-test-device-pci,id=other,chardev=c1,virtio-id=4",
]  # fmt: skip


def rewritten(whole: Path, command: list[str]) -> list[str]:
    manifest = open_snapshot(whole)
    return rewrite(command, manifest, {"mem": Path("/dev/shm/r")}, whole / "state")


def test_command_line_becomes_one_that_restores(whole: Path) -> None:
    words = rewritten(whole, COMMAND)
    backend = json.loads(words[words.index("-object") + 1])
    assert backend == {
        "qom-type": "memory-backend-file",
        "id": "mem",
        "size": 64 * PAGE,
        "mem-path": "/dev/shm/r",
        "share": True,
        "policy": "bind",
        "host-nodes": "0",
    }
    text = " ".join(words)
    assert "balloon0" not in text
    assert "c0" not in text
    assert "id=other,chardev=c1" in text
    assert "rng-random" in text
    assert words[-2:] == ["-incoming", f"file:{whole / 'state'}"]
    assert "migration.x-ignore-shared=on" in words


def test_command_line_in_json(whole: Path) -> None:
    command = [
        "qemu", "-object", '{"qom-type":"memory-backend-memfd","id":"mem","size":262144}',
        "-device", '{"driver":"vhost-user-test-device-pci","id":"balloon0","chardev":"c0"}',
    ]  # fmt: skip
    words = rewritten(whole, command)
    assert len(words) == 1 + 2 + 4
    assert json.loads(words[2])["qom-type"] == "memory-backend-file"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ([], "no command"),
        (["qemu", "-m", "1G"], "id=mem"),
        ([*COMMAND, "-incoming", "defer"], "another state"),
        (["qemu", "-object"], "without a value"),
    ],
)
def test_command_line_of_another_machine_is_refused(
    whole: Path, command: list[str], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        rewritten(whole, command)


def test_devices_only_state_needs_no_switch(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "snap")
    parts(store)
    store.finish(manifest_of(store, StateKind.DEVICES_ONLY))
    words = rewritten(tmp_path / "snap", COMMAND)
    assert words[-2:] == ["-incoming", f"file:{tmp_path / 'snap' / 'state'}"]
    assert not any(word.startswith("migration.") for word in words)


def test_balloon_may_be_elsewhere(whole: Path) -> None:
    manifest = open_snapshot(whole)
    assert balloon_arguments(manifest, None) == (DEVICE, {"id": "c0", "path": "/run/b.sock"})
    assert balloon_arguments(manifest, "/x")[1] == {"id": "c0", "path": "/x"}


HOSTILE = [
    {"driver": "vfio-pci", "host": "0000:00:02.0"},
    {**DEVICE, "romfile": "/etc/shadow"},
    {**DEVICE, "virtio-id": 2},
    {k: v for k, v in DEVICE.items() if k != "virtio-id"},
    {**DEVICE, "addr": {"a": "b"}},
    {**DEVICE, "socket": {"type": "unix", "path": "/x"}},
    {"driver": "vfio-user-pci", "id": "balloon0"},
]


@pytest.mark.parametrize("device", HOSTILE, ids=repr)
def test_nothing_but_a_balloon_is_plugged_in(whole: Path, device: dict[str, Any]) -> None:
    manifest = replace(open_snapshot(whole), balloon={"device": device, "chardev": None})
    with pytest.raises(UsageError, match="is not a balloon"):
        balloon_arguments(manifest, "/x")


def test_balloon_without_a_socket_needs_one(whole: Path) -> None:
    manifest = replace(open_snapshot(whole), balloon={"device": dict(DEVICE), "chardev": None})
    with pytest.raises(UsageError, match="--balloon-socket"):
        balloon_arguments(manifest, None)
    assert balloon_arguments(manifest, "/x")[1] == {"id": "c0", "path": "/x"}


def test_private_memory_is_mapped_copy_on_write(whole: Path) -> None:
    manifest = open_snapshot(whole)
    words = rewrite(COMMAND, manifest, {"mem": whole / "mem.ram"}, whole / "state", private=True)
    backend = json.loads(words[words.index("-object") + 1])
    assert (backend["share"], backend["readonly"], backend["rom"]) == (False, True, "off")


def test_anonymous_memory_leaves_no_name(whole: Path, tmp_path: Path) -> None:
    manifest = open_snapshot(whole)
    for folder in (Path("/dev/shm"), tmp_path / "ram"):
        (tmp_path / "ram").mkdir(exist_ok=True)
        place = RamPlace(folder)
        before = set(folder.iterdir())
        place.fill(whole, manifest)
        assert set(folder.iterdir()) == before
        assert place.files["mem"].read_bytes() == (whole / "mem.ram").read_bytes()
        place.remove()


def test_qemu_dies_with_a_restore_whose_guest_does_not_run_yet() -> None:
    """The restore is killed: its end of the pipe is closed, and no word has come."""
    for runs in (False, True):
        with subprocess.Popen(["sleep", "60"]) as process:
            with Warden() as warden:
                warden.watch(process.pid)
                if runs:
                    warden.dismiss()
            if runs:
                assert process.poll() is None
                process.kill()
            else:
                assert process.wait(20) == -signal.SIGKILL


def test_target_is_kept(whole: Path) -> None:
    data = json.loads((whole / "manifest.json").read_text())
    assert SnapshotManifest.loads(json.dumps(data)).balloon.get("target") is None
    data["balloon"]["target"] = 600 << 20
    assert SnapshotManifest.loads(json.dumps(data)).balloon["target"] == 600 << 20
    data["balloon"]["target"] = "much"
    with pytest.raises(SnapshotManifestError):
        SnapshotManifest.loads(json.dumps(data))


def test_stream_never_ends_the_machine() -> None:
    words = ["snapshot", "--qmp", "q", "--control", "c", "--output", "-", "--quit"]
    done = subprocess.run(
        [sys.executable, "-m", "vballoon", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "vballoon send" in done.stderr


@pytest.mark.parametrize("at", [0, 9 * PAGE, 30 * PAGE])
def test_memory_is_checked_while_it_is_filled(whole: Path, at: int) -> None:
    """The bytes that are checked are those that QEMU gets, whatever happens to the file."""
    manifest = open_snapshot(whole)
    place = RamPlace(Path("/dev/shm"))
    place.fill(whole, manifest)
    place.remove()
    before = (whole / "mem.ram").read_bytes()[at]
    patch(whole / "mem.ram", at, bytes([before ^ 1]))
    with pytest.raises(UsageError, match="differs from the manifest"):
        place.fill(whole, manifest)
    place.remove()
    place.fill(whole, manifest, verify=False)
    place.remove()
