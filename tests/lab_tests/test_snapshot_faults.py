# SPDX-License-Identifier: Apache-2.0
"""Whatever goes wrong with a snapshot: the guest runs on with its balloon, and nothing half is
taken for a whole.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab import Machine
from tests.lab.backend import Backend, negotiated, wait_until
from tests.lab_tests.snapshot_lab import VBALLOON, balloon_guest, fill, snapshot, unharmed

from vballoon.errors import UsageError
from vballoon.snapshot.store import open_snapshot
from vballoon.snapshot.take import COLD

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

STEPS = tuple(step.name for step in COLD)
KILLED = """
import os, signal, sys
from vballoon.control.client import ControlClient
from vballoon.snapshot.process import Process
from vballoon.snapshot.qmp_vm import QemuVm
from vballoon.snapshot.run import Observer, Run
from vballoon.snapshot.source import GuestSource
from vballoon.snapshot.store import DirectoryStore
from vballoon.snapshot.take import take

qmp, control, directory, where = sys.argv[1:]

class Killer(Observer):
    def step(self, name):
        if name == where:
            os.kill(os.getpid(), signal.SIGKILL)

    def copied(self, done):
        if where == "half copied":
            os.kill(os.getpid(), signal.SIGKILL)

with (
    QemuVm(qmp) as vm,
    ControlClient(control) as client,
    GuestSource.fetch(client, Process(vm.pid)) as source,
):
    take(Run(vm, source, DirectoryStore(directory), observer=Killer()))
"""
INTERRUPTED = """
import os, signal, sys
from vballoon.cli import main
from vballoon.snapshot.run import Run

where, begin = sys.argv.pop(1), Run.begin
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored

def interrupted(self, name):
    begin(self, name)
    if name == where:
        os.kill(os.getpid(), signal.SIGINT)

Run.begin = interrupted
sys.exit(main())
"""


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with Backend("vhost-user") as served:
        yield served


@pytest.fixture(scope="module")
def vm(backend: Backend) -> Iterator[Machine]:
    with balloon_guest(backend, kernel="6.12", backing="file", memory=512) as machine:
        fill(machine, 100)
        yield machine


def lives_on(vm: Machine, backend: Backend, directory: Path) -> None:
    """Check that the guest runs with all its data and its balloon, and that no snapshot exists."""
    wait_until(lambda: vm.qmp("query-status")["status"] == "running", timeout=20)
    wait_until(lambda: has_balloon(vm) and negotiated(backend), timeout=20)
    unharmed(vm)
    with pytest.raises(UsageError):
        open_snapshot(directory)
    assert not capability(vm)


def has_balloon(vm: Machine) -> bool:
    children = vm.qmp("qom-list", path="/machine/peripheral")
    return any(child["name"] == "balloon0" for child in children)


def capability(vm: Machine) -> bool:
    entries = vm.qmp("query-migrate-capabilities")
    return any(e["capability"] == "x-ignore-shared" and e["state"] for e in entries)


@pytest.mark.parametrize("step", [*STEPS, "half copied"])
def test_killed_at_any_step(vm: Machine, backend: Backend, tmp_path: Path, step: str) -> None:
    directory = tmp_path / "snap"
    words = [str(vm.qmp_socket), str(backend.control_socket), str(directory), step]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    lives_on(vm, backend, directory)
    refused = subprocess.run([*VBALLOON, "restore", directory], check=False, capture_output=True)
    assert refused.returncode == 1
    assert b"not a whole snapshot" in refused.stderr


def test_full_disk(vm: Machine, backend: Backend, tmp_path: Path) -> None:
    """A limit on the size of files replaces a full disk: the copy ends in the middle."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, 20 << 20))

    command = [
        *VBALLOON, "snapshot", "--qmp", str(vm.qmp_socket),
        "--control", str(backend.control_socket), str(tmp_path / "snap"),
    ]  # fmt: skip
    done = subprocess.run(command, preexec_fn=limit, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot write the snapshot" in done.stderr
    assert "Traceback" not in done.stderr
    lives_on(vm, backend, tmp_path / "snap")
    assert not (tmp_path / "snap").exists()


@pytest.mark.parametrize("step", STEPS)
def test_interrupted(vm: Machine, backend: Backend, tmp_path: Path, step: str) -> None:
    """Ctrl-C, wherever the command is."""
    words = [
        "snapshot", "--qmp", str(vm.qmp_socket), "--control", str(backend.control_socket),
        str(tmp_path / "snap"),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, step, *words],
        check=False,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    lives_on(vm, backend, tmp_path / "snap")
    assert not (tmp_path / "snap").exists()


def test_no_control_socket(vm: Machine, backend: Backend, tmp_path: Path) -> None:
    command = [*VBALLOON, "snapshot", "--qmp", str(vm.qmp_socket), "--control", "/nowhere"]
    done = subprocess.run(
        [*command, str(tmp_path / "snap")], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (
        1,
        "vballoon: /nowhere: No such file or directory; is 'vballoon serve --control' running?\n",
    )
    lives_on(vm, backend, tmp_path / "snap")


def test_monitor_that_somebody_else_uses(vm: Machine, backend: Backend, tmp_path: Path) -> None:
    from vballoon.snapshot.qmp_vm import QemuVm

    with QemuVm(vm.qmp_socket):
        started = time.monotonic()
        done = snapshot(vm, backend, tmp_path / "snap")
    assert done.returncode == 1
    assert "no answer" in done.stderr
    assert time.monotonic() - started < 30
    lives_on(vm, backend, tmp_path / "snap")


def test_guest_that_stands_still(vm: Machine, backend: Backend, tmp_path: Path) -> None:
    vm.qmp("stop")
    done = snapshot(vm, backend, tmp_path / "snap")
    assert done.returncode == 1
    assert "must be running" in done.stderr
    vm.qmp("cont")
    lives_on(vm, backend, tmp_path / "snap")


def test_slot_that_cannot_unplug(backend: Backend, tmp_path: Path) -> None:
    """Directly on pcie.0 of q35, QEMU refuses at once."""
    with Backend("vhost-user") as fixed:
        arguments = fixed.device("q35", port="pcie.0")
        with Machine(kernel="6.12", memory=256, backing="file", extra=arguments) as vm:
            vm.guest.load("virtio_balloon")
            fill(vm, 10)
            done = snapshot(vm, fixed, tmp_path / "snap")
            assert done.returncode == 1
            assert "hotplug" in done.stderr
            lives_on(vm, fixed, tmp_path / "snap")


def test_guest_that_does_not_let_go(tmp_path: Path) -> None:
    """A guest without a driver for hot-plugging: the request is never answered."""
    with (
        Backend("vhost-user") as stuck,
        balloon_guest(
            stuck, kernel="6.12", backing="file", memory=256, append="acpi=off pcie_ports=compat"
        ) as vm,
    ):
        vm.guest.sh("keeper make /tmp/kept 4")
        done = snapshot(vm, stuck, tmp_path / "snap", "--unplug-timeout", "2")
        assert done.returncode == 1
        assert "did not release" in done.stderr
        assert vm.qmp("query-status")["status"] == "running"
        assert has_balloon(vm)
        assert negotiated(stuck)
        assert vm.guest.sh("keeper check /tmp/kept").startswith("good")
        assert not (tmp_path / "snap").exists()


def test_qemu_dies_in_the_middle(tmp_path: Path) -> None:
    with (
        Backend("vhost-user") as doomed,
        balloon_guest(doomed, kernel="6.12", backing="file", memory=256) as vm,
    ):
        command = [
            *VBALLOON, "snapshot", "--qmp", str(vm.qmp_socket),
            "--control", str(doomed.control_socket), str(tmp_path / "snap"),
        ]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            wait_until(lambda: not has_balloon(vm), timeout=30, step=0.005)
            os.kill(vm.pid, signal.SIGKILL)
            _, words = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "Traceback" not in words
        with pytest.raises(UsageError):
            open_snapshot(tmp_path / "snap")
