# SPDX-License-Identifier: Apache-2.0
"""A guest is saved without its free memory, and lives on: where it was, and restored elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tests.lab import NAMES, Machine
from tests.lab.backend import Backend, negotiated, wait_until
from tests.lab_tests.snapshot_lab import (
    MIB,
    VBALLOON,
    RestoredMachine,
    balloon_guest,
    balloon_works,
    fill,
    guest_module,
    reporting_is_quiet,
    snapshot,
    unharmed,
)

from vballoon.snapshot.store import open_snapshot

pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]
MEMORY = 1536
FREED = 1000


@pytest.mark.parametrize("driver", ["stock", "module"])
@pytest.mark.parametrize(("machine", "backing"), [("pc", "memfd"), ("q35", "file")])
@pytest.mark.parametrize("kernel", NAMES)
def test_saved_and_restored(
    kernel: str, machine: str, backing: str, driver: str, tmp_path: Path
) -> None:
    module = guest_module(kernel, tmp_path) if driver == "module" else None
    # with the module, nothing is discarded: what is left out is left out by verification alone
    options = ["--no-discard"] if module else []
    saved = tmp_path / "saved"
    with (
        Backend("vhost-user", *options) as backend,
        Backend("vhost-user", *options) as elsewhere,
        balloon_guest(
            backend, module=module, kernel=kernel, machine=machine, backing=backing, memory=MEMORY
        ) as vm,
    ):
        fill(vm, FREED)
        reporting_is_quiet(backend)
        done = snapshot(vm, backend, saved)
        assert done.returncode == 0, done.stderr
        only_what_is_used_was_copied(vm, saved, 1.02 if module else 1.25)
        unharmed(vm)
        migrates_all_memory(vm)
        balloon_works(vm, backend, MEMORY)
        done = snapshot(vm, backend, tmp_path / "last", "--quit")
        assert done.returncode == 0, done.stderr
        assert vm.process.wait(20) == 0
        for directory in (saved, tmp_path / "last"):
            restored = RestoredMachine(vm, directory, "--balloon-socket", str(elsewhere.socket))
            with restored as other:
                unharmed(other)
                migrates_all_memory(other)
                balloon_works(other, elsewhere, MEMORY)
                unharmed(other)
                done = snapshot(other, elsewhere, tmp_path / f"{directory.name}-again")
                assert done.returncode == 0, done.stderr
                unharmed(other)


def migrates_all_memory(vm: Machine) -> None:
    """Check that a snapshot resets QEMU's migration settings: a later one would lose memory."""
    capabilities = {c["capability"]: c["state"] for c in vm.qmp("query-migrate-capabilities")}
    assert capabilities["x-ignore-shared"] is False


def only_what_is_used_was_copied(vm: Machine, saved: Path, factor: float) -> None:
    """At most *factor* times what the guest has in use: all that is not free.

    (Free page reporting alone leaves what is free in blocks of less than 2 or 4 MiB.)
    """
    manifest = json.loads((saved / "manifest.json").read_text())
    copied = sum(memory["data"] for memory in manifest["memory"])
    used = MEMORY * MIB - vm.guest.meminfo()["MemFree"]
    assert copied <= factor * used + 4 * MIB, (copied / MIB, used / MIB, manifest)
    on_disk = sum((saved / m["file"]).stat().st_blocks * 512 for m in manifest["memory"])
    assert on_disk <= copied + MIB


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_over_vfio_user(machine: str, tmp_path: Path) -> None:
    """The function is served without MSI-X: QEMU 11.1 would abort when it is unplugged."""
    with (
        Backend("vfio-user", "--no-msix") as backend,
        Backend("vfio-user", "--no-msix") as elsewhere,
        balloon_guest(backend, kernel="6.12", machine=machine, memory=512) as vm,
    ):
        fill(vm, 100)
        socket = ["--device-socket", str(backend.socket)]
        done = snapshot(vm, backend, tmp_path / "saved", *socket)
        assert done.returncode == 0, done.stderr
        unharmed(vm)
        balloon_works(vm, backend, 512)
        done = snapshot(vm, backend, tmp_path / "last", *socket, "--quit")
        assert done.returncode == 0, done.stderr
        assert vm.process.wait(20) == 0
        place = ["--balloon-socket", str(elsewhere.socket)]
        with RestoredMachine(vm, tmp_path / "last", *place) as restored:
            unharmed(restored)
            balloon_works(restored, elsewhere, 512)


def test_vfio_user_device_with_msix_is_left_alone(tmp_path: Path) -> None:
    with (
        Backend("vfio-user") as backend,
        balloon_guest(backend, kernel="6.12", memory=256) as vm,
    ):
        socket = ["--device-socket", str(backend.socket)]
        done = snapshot(vm, backend, tmp_path / "saved", *socket)
        assert done.returncode == 1
        assert "--no-msix" in done.stderr
        assert vm.qmp("query-status")["status"] == "running"
        assert vm.guest.sh("ls /sys/bus/virtio/devices")


def test_memory_of_two_nodes(tmp_path: Path) -> None:
    """Two memfds of one size: each file must match the right memory backend."""
    module = guest_module("6.12", tmp_path)
    hardware: dict[str, Any] = {
        "kernel": "6.12",
        "machine": "pc",
        "memory": 1024,
        "nodes": 2,
        "smp": 2,
    }
    with (
        Backend("vhost-user", "--no-discard") as backend,
        balloon_guest(backend, module=module, **hardware) as vm,
    ):
        fill(vm, 300)
        done = snapshot(vm, backend, tmp_path / "saved", "--quit")
        assert done.returncode == 0, done.stderr
        assert vm.process.wait(20) == 0
        manifest = json.loads((tmp_path / "saved" / "manifest.json").read_text())
        assert manifest["verification"] == ""
        assert manifest["left_out"]["verified"] > 150 * MIB
        with RestoredMachine(vm, tmp_path / "saved", "--no-balloon") as restored:
            unharmed(restored)


class MovedMachine(RestoredMachine):
    """The machine of *original*, received over the socket *link* by ``vballoon receive``."""

    def __init__(self, original: Machine, directory: Path, link: Path, elsewhere: Backend) -> None:
        super().__init__(original, directory)
        self._words = [
            *VBALLOON, "receive", str(directory), "--from", f"unix:{link}",
            "--balloon-socket", str(elsewhere.socket), "--control", str(elsewhere.control_socket),
            "--",
        ]  # fmt: skip


@pytest.mark.parametrize("backing", ["memfd", "file"])
def test_moved_by_the_commit_protocol(tmp_path: Path, backing: str) -> None:
    """``vballoon send`` to ``vballoon receive``; the balloon's target moves along."""
    target = 400 * MIB
    before = set(Path("/dev/shm").iterdir())
    with (
        Backend("vhost-user") as backend,
        Backend("vhost-user") as elsewhere,
        tempfile.TemporaryDirectory() as short,
        balloon_guest(backend, kernel="6.12", memory=512, backing=backing) as vm,
    ):
        vm.guest.sh("keeper make /tmp/kept 10")
        backend.ctl("balloon", value=target)
        wait_until(lambda: backend.ctl("query-balloon")["actual"] <= target, timeout=30)
        link = Path(short) / "link"
        command = [
            *VBALLOON, "send", "--qmp", str(vm.qmp_socket), "--to", f"unix:{link}",
            "--control", str(backend.control_socket),
        ]  # fmt: skip
        waiting = ["sh", "-c", 'until [ -S "$0" ]; do sleep 0.1; done; sleep 0.5; exec "$@"']
        with (
            subprocess.Popen([*waiting, str(link), *command]) as sender,
            MovedMachine(vm, tmp_path / "there", link, elsewhere) as other,
        ):
            assert sender.wait(90) == 0
            assert vm.process.wait(20) == 0
            assert other.guest.sh("keeper check /tmp/kept").startswith("good")
            wait_until(lambda: negotiated(elsewhere), timeout=30)
            wait_until(lambda: elsewhere.ctl("query-balloon")["actual"] <= target, timeout=30)
            assert not (tmp_path / "there").exists()
    assert set(Path("/dev/shm").iterdir()) - before == set()


def test_two_private_clones(tmp_path: Path) -> None:
    """They run from the snapshot's own files, which they leave unchanged."""
    with (
        Backend("vhost-user") as backend,
        balloon_guest(backend, kernel="6.12", memory=256) as vm,
    ):
        vm.guest.sh("keeper make /tmp/kept 4")
        assert snapshot(vm, backend, tmp_path / "saved", "--quit").returncode == 0
        with (
            RestoredMachine(vm, tmp_path / "saved", "--private") as one,
            RestoredMachine(vm, tmp_path / "saved", "--private") as two,
        ):
            for clone in (one, two):
                assert clone.guest.sh("keeper check /tmp/kept").startswith("good")
                clone.guest.sh("keeper make /tmp/more 20")
            for clone in (one, two):
                assert clone.guest.sh("keeper check /tmp/kept").startswith("good")
                assert clone.guest.sh("keeper check /tmp/more").startswith("good")
            assert "without its balloon" in one.words()
        open_snapshot(tmp_path / "saved")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_restore_that_is_ended_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """Killed, it leaves a running guest alone; SIGTERM reaches QEMU."""
    with (
        Backend("vhost-user") as backend,
        balloon_guest(backend, kernel="6.12", memory=256) as vm,
    ):
        vm.guest.sh("keeper make /tmp/kept 4")
        assert snapshot(vm, backend, tmp_path / "saved", "--quit").returncode == 0
        before = set(Path("/dev/shm").iterdir())
        with RestoredMachine(vm, tmp_path / "saved", "--no-balloon") as other:
            wait_until(lambda: "restored" in other.words(), timeout=60)
            assert set(Path("/dev/shm").iterdir()) - before == set()
            os.kill(other.process.pid, number)
            other.process.wait(20)
            if number == signal.SIGKILL:
                assert other.guest.sh("keeper check /tmp/kept").startswith("good")
                other.qmp("quit")
            else:
                assert other.process.returncode == 0
        assert set(Path("/dev/shm").iterdir()) - before == set()


def test_inflated_balloon_comes_back_as_large(tmp_path: Path) -> None:
    """The guest takes its pages back for the unplugging, and gives them up again afterwards."""
    target = 384 * MIB
    with (
        Backend("vhost-user") as backend,
        balloon_guest(backend, kernel="6.12", memory=512) as vm,
    ):
        vm.guest.sh("keeper make /tmp/kept 10")
        backend.ctl("balloon", value=target)
        wait_until(lambda: backend.ctl("query-balloon")["actual"] <= target)
        done = snapshot(vm, backend, tmp_path / "saved")
        assert done.returncode == 0, done.stderr
        wait_until(lambda: backend.ctl("query-balloon")["actual"] == target, timeout=30)
        assert vm.guest.sh("keeper check /tmp/kept").startswith("good")
