# SPDX-License-Identifier: Apache-2.0
"""Verified skip under load: a guest that allocates and frees without rest moves twenty times.

And the proof that this could fail: with ranges of a walk of some seconds ago in place of verified
ones, the same guest comes out broken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.lab import GuestError, LabError, Machine
from tests.lab.backend import Backend, wait_until
from tests.lab_tests.snapshot_lab import (
    MIB,
    RestoredMachine,
    balloon_guest,
    guest_module,
    snapshot,
    unharmed,
)

from vballoon.control.client import ControlClient
from vballoon.skipmap import Provenance, SkipExport
from vballoon.snapshot.memmap import FreeMemory
from vballoon.snapshot.process import Process
from vballoon.snapshot.qmp_vm import QemuVm
from vballoon.snapshot.run import Run
from vballoon.snapshot.source import GuestSource
from vballoon.snapshot.store import DirectoryStore, open_snapshot
from vballoon.snapshot.take import take as take_snapshot

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1200)]
MOVES = 20
MEMORY = 512


def busy(vm: Machine) -> None:
    """Known content, and a load that checks every byte it reads back."""
    vm.guest.sh("keeper make /tmp/kept 20")
    vm.guest.start("memhog 40", log="/run/hog.log", fifo="/run/hog")
    vm.guest.wait_for("grep -q filled /run/hog.log")
    churn(vm)


def churn(vm: Machine) -> None:
    vm.guest.sh("memhog 150 </dev/null >/dev/null", timeout=100)
    pid = vm.guest.start("churn 150", log="/run/churn.log")
    vm.guest.sh(f"echo {pid} >/run/churn.pid; sleep 2")


def rested(vm: Machine) -> None:
    """End the load and check that it has found no error."""
    vm.guest.sh("kill -TERM $(cat /run/churn.pid)")
    vm.guest.wait_for("grep -q steps /run/churn.log", timeout=30)
    words = vm.guest.sh("cat /run/churn.log")
    assert words.endswith(" 0 bad"), words
    unharmed(vm)


def test_moved_twenty_times_under_load(tmp_path: Path) -> None:
    module = guest_module("6.12", tmp_path)
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(Backend("vhost-user", "--no-discard"))
        guest = balloon_guest(
            backend, module=module, kernel="6.12", memory=MEMORY, smp=2, backing="file"
        )
        first = vm = stack.enter_context(guest)
        busy(first)
        for number in range(MOVES):
            directory = tmp_path / f"move{number}"
            done = snapshot(vm, backend, directory, "--quit")
            assert done.returncode == 0, done.stderr
            manifest = open_snapshot(directory)
            assert manifest.verification == ""
            assert manifest.left_out["verified"] > MIB
            vm.close()
            backend = stack.enter_context(Backend("vhost-user", "--no-discard"))
            moved = RestoredMachine(first, directory, "--balloon-socket", str(backend.socket))
            vm = stack.enter_context(moved)
            vm.guest.sh("sleep 1")
            wait_until(lambda words=vm.words: "restored" in words())
            rested(vm)
            churn(vm)
            (directory / "ram0.ram").unlink()
        rested(vm)


def test_stale_ranges_do_break_the_guest(tmp_path: Path) -> None:
    module = guest_module("6.12", tmp_path)
    with (
        Backend("vhost-user", "--no-discard") as backend,
        balloon_guest(
            backend, module=module, kernel="6.12", memory=MEMORY, smp=2, backing="file"
        ) as vm,
    ):
        busy(vm)
        stale = walked(backend, tmp_path / "bits")
        assert stale.pages * 4096 > 20 * MIB
        # The load alone may live on what itself has freed; these pages come from what was free.
        vm.guest.sh("keeper make /tmp/later 20; sleep 2")
        take(vm, backend, tmp_path / "good", None)
        vm.guest.wait_for("test -d /sys/bus/virtio/devices/virtio0", timeout=20)
        take(vm, backend, tmp_path / "stale", lambda source: stale)
        rested(vm)  # the source itself is none the worse
        with RestoredMachine(vm, tmp_path / "good", "--no-balloon") as good:
            all_good(good)
        broken = RestoredMachine(vm, tmp_path / "stale", "--no-balloon")
        with broken, pytest.raises((AssertionError, GuestError, LabError, OSError)):
            all_good(broken)


def all_good(vm: Machine) -> None:
    """Check that the load has found no error and that the files made after the walk are intact."""
    rested(vm)
    assert vm.guest.sh("keeper check /tmp/later").startswith("good")


def walked(backend: Backend, folder: Path) -> FreeMemory:
    """Return the ranges of a walk, as if they were still valid later."""
    backend.ctl("start-walk")
    done = backend.events.wait_event("ROUND_COMPLETED", timeout=60)["data"]
    assert done["complete"], done
    backend.export(folder)
    bitmap = SkipExport(folder).bitmap(Provenance.WALKED)
    return FreeMemory(bitmap.extents(), 0, bitmap.count(), 0)


def take(
    vm: Machine,
    backend: Backend,
    directory: Path,
    free_memory: Callable[[GuestSource], FreeMemory] | None,
) -> None:
    with (
        QemuVm(vm.qmp_socket) as monitor,
        ControlClient(backend.control_socket) as control,
        GuestSource.fetch(control, Process(monitor.pid)) as source,
    ):
        store = DirectoryStore(directory)
        take_snapshot(Run(monitor, source, store, free_memory=free_memory))
