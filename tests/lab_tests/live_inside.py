# SPDX-License-Identifier: Apache-2.0
"""Live snapshots on a host kernel that tracks writes; run inside a lab guest by a test.

One guest under load is saved twice, with a working tracker and with one that reports nothing, and
restored from each.  Prints one line of JSON: in how many rounds what was copied, and how the
guests came out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.lab import LabError, Machine
from tests.lab.backend import Backend, negotiated, wait_until
from tests.lab.qmp import Qmp
from tests.lab_tests.snapshot_lab import RestoredMachine

from vballoon.control.client import ControlClient
from vballoon.snapshot.process import Process
from vballoon.snapshot.qmp_vm import QemuVm
from vballoon.snapshot.run import Observer, Options, Run
from vballoon.snapshot.source import GuestSource
from vballoon.snapshot.store import DirectoryStore
from vballoon.snapshot.take import take as take_snapshot
from vballoon.snapshot.tracker import SoftDirty

HARDWARE: dict[str, Any] = {"kernel": "6.12", "machine": "pc", "memory": 192, "cpu": "qemu64"}
"""As little as a Debian kernel runs on; its many features cost an emulated processor time."""
SLOW = 300
"""Seconds for what takes one on a processor that is not emulated twice."""
BEGIN = time.monotonic()


def say(*words: object) -> None:
    """Print the step and the time since the start."""
    print(f"{time.monotonic() - BEGIN:6.1f} s:", *words, file=sys.stderr, flush=True)


class Steps(Observer):
    def __init__(self) -> None:
        self.steps: list[str] = []
        self.sizes: list[int] = []

    def step(self, name: str) -> None:
        self.steps.append(name)
        say(name)

    def size(self, total: int) -> None:
        self.sizes.append(total)
        say(f"{total >> 20} MiB")


class BlindTracker(SoftDirty):
    """The planted fault: the tracker reports no writes."""

    def collect(self):
        return [found[:0] for found in super().collect()]


TRACKERS = {"sound": SoftDirty, "blind": BlindTracker}


class PatientBackend(Backend):
    """A server that may take minutes to start: this processor is emulated."""

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(lambda: self.control_socket.exists() and self.socket.exists(), timeout=SLOW)
        self._control = Qmp(self.control_socket)


class PatientMachine(Machine):
    def wait_until_up(self, timeout: float = 900) -> None:
        super().wait_until_up(timeout)


# One script each: in there, a command and its answer take ten seconds.
FILL = """
load virtio_balloon
keeper make /tmp/kept 4 || exit 1
mkfifo /run/hog && { memhog 8 <>/run/hog >/run/hog.log 2>&1 & }
until grep -q filled /run/hog.log; do sleep 1; done
memhog 40 </dev/null >/dev/null
"""
LOAD = "{ churn 12 >/run/churn.log 2>&1 </dev/null & }; sleep 3"
CHECK = """
killall -TERM churn; until grep -q steps /run/churn.log; do sleep 1; done
lines=$(wc -l </run/hog.log); echo check >/run/hog
until test $(wc -l </run/hog.log) -gt $lines; do sleep 1; done
keeper check /tmp/kept && tail -n 1 /run/hog.log && cat /run/churn.log
"""


def good(vm: Machine) -> bool:
    """Whether everything is as it was; the load ends."""
    try:
        found = vm.guest.run(CHECK, timeout=SLOW)
    except LabError as error:
        say(error)
        return False
    say(found)
    kept, hog, churn = (found.text.splitlines() + [""] * 3)[:3]
    return kept.startswith("good") and hog == "good" and churn.endswith(" 0 bad")


def take(vm: Machine, backend: Backend, saved: Path, kind: str, seen: Steps) -> None:
    with (
        QemuVm(vm.qmp_socket) as monitor,
        ControlClient(backend.control_socket) as control,
        GuestSource.fetch(control, Process(monitor.pid)) as source,
    ):
        run = Run(
            monitor,
            source,
            DirectoryStore(saved),
            Options(live=True, hint=True, unplug_seconds=SLOW),  # no module is in this guest
            seen,
            control=control,
            make_tracker=lambda blocks: TRACKERS[kind](monitor.pid, blocks),
        )
        take_snapshot(run)


def saved_and_restored(vm: Machine, backend: Backend, folder: Path, kind: str) -> dict[str, Any]:
    """One live snapshot under load."""
    say(kind)
    seen = Steps()
    wait_until(lambda: negotiated(backend), timeout=SLOW)
    vm.guest.sh(LOAD, timeout=SLOW)
    take(vm, backend, folder / kind, kind, seen)
    source = good(vm)
    vm.qmp("stop")  # the processor is needed for the other one
    with RestoredMachine(vm, folder / kind, "--no-balloon", "--no-verify") as other:
        restored = good(other)
    vm.qmp("cont")
    return {"sizes": seen.sizes, "steps": seen.steps, "source": source, "restored": restored}


def main() -> int:
    """Both trackers."""
    folder = Path(tempfile.mkdtemp())
    with PatientBackend("vhost-user", "--no-discard") as backend:
        say("the server listens")
        extra = backend.device("pc")
        with PatientMachine(**HARDWARE, extra=extra) as vm:
            say("the guest is up")
            vm.guest.sh(FILL, timeout=2 * SLOW)
            say("it has something to lose")
            found = {kind: saved_and_restored(vm, backend, folder, kind) for kind in TRACKERS}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
