# SPDX-License-Identifier: Apache-2.0
"""A live snapshot on a host kernel that tracks writes; run inside a lab guest by a test.

Prints one line of JSON: what was copied in how many rounds, and how the guests came out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.lab import LabError, Machine
from tests.lab.backend import Backend, negotiated, wait_until
from tests.lab.qmp import Qmp
from tests.lab_tests.snapshot_lab import RestoredMachine

from vballoon.control.client import ControlClient
from vballoon.snapshot.live import LiveSnapshot
from vballoon.snapshot.qmp_vm import QemuVm
from vballoon.snapshot.source import GuestSource
from vballoon.snapshot.store import DirectoryStore
from vballoon.snapshot.take import Observer
from vballoon.snapshot.tracker import SoftDirty

MEMORY = 256


class Steps(Observer):
    def __init__(self) -> None:
        self.steps: list[str] = []
        self.sizes: list[int] = []

    def step(self, name: str) -> None:
        self.steps.append(name)

    def size(self, total: int) -> None:
        self.sizes.append(total)


class BlindTracker(SoftDirty):
    """The fault to be noticed: nothing that was written is told."""

    def collect(self):
        return [found[:0] for found in super().collect()]


class PatientBackend(Backend):
    """A server that may take minutes to start: this processor is emulated."""

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(lambda: self.control_socket.exists() and self.socket.exists(), timeout=300)
        self._control = Qmp(self.control_socket)


class PatientMachine(Machine):
    def wait_until_up(self, timeout: float = 900) -> None:
        super().wait_until_up(timeout)


def fill_a_little(vm: Machine) -> None:
    """The driver, known content, garbage in free memory, and a load."""
    vm.guest.sh("load virtio_balloon", timeout=300)
    vm.guest.sh("keeper make /tmp/kept 8", timeout=300)
    vm.guest.start("memhog 16", log="/run/hog.log", fifo="/run/hog")
    vm.guest.sh("until grep -q filled /run/hog.log; do sleep 1; done", timeout=300)
    vm.guest.sh("memhog 60 </dev/null >/dev/null", timeout=600)
    vm.guest.start("churn 24", log="/run/churn.log")


def good(vm: Machine) -> bool:
    """Whether everything is as it was; the load ends."""
    vm.guest.sh("killall -TERM churn; until grep -q steps /run/churn.log; do sleep 1; done",
                timeout=300)  # fmt: skip
    vm.guest.sh("echo check >/run/hog; until test $(wc -l </run/hog.log) -gt 1; do sleep 1; done",
                timeout=300)  # fmt: skip
    kept = vm.guest.run("keeper check /tmp/kept", timeout=300)
    hog, churn = vm.guest.sh("tail -n 1 /run/hog.log"), vm.guest.sh("cat /run/churn.log")
    print(kept.out, hog, churn, file=sys.stderr)
    return kept.status == 0 and hog == "good" and churn.endswith(" 0 bad")


def take(vm: Machine, backend: Backend, saved: Path, kind: str, seen: Steps) -> None:
    tracker = {"sound": SoftDirty, "blind": BlindTracker}[kind]
    with (
        QemuVm(vm.qmp_socket) as monitor,
        ControlClient(backend.control_socket) as control,
        GuestSource.fetch(control) as source,
    ):
        LiveSnapshot(
            monitor,
            source,
            DirectoryStore(saved),
            observer=seen,
            control=control,
            unplug_seconds=300,
            make_tracker=lambda blocks: tracker(monitor.pid, blocks),
        ).take()


def main() -> int:
    saved, seen = Path(tempfile.mkdtemp()) / "live", Steps()
    with PatientBackend("vhost-user", "--no-discard") as backend:
        extra = backend.device("pc")
        with PatientMachine(kernel="6.12", machine="pc", memory=MEMORY, extra=extra) as vm:
            fill_a_little(vm)
            wait_until(lambda: negotiated(backend), timeout=300)
            take(vm, backend, saved, sys.argv[1], seen)
            print(seen.steps, seen.sizes, file=sys.stderr)
            source_good = good(vm)
            vm.qmp("quit")
            with RestoredMachine(vm, saved, "--no-balloon") as other:
                try:
                    restored_good = good(other)
                except LabError as error:
                    print(error, file=sys.stderr)
                    restored_good = False
    result = {"sizes": seen.sizes, "steps": seen.steps, "source": source_good}
    print(json.dumps({**result, "restored": restored_good}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
