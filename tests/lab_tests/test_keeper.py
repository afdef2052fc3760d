# SPDX-License-Identifier: Apache-2.0
"""Workers are killed under stock QEMU and a stock guest, which notice nothing.

The keeper's child is the warm parent, and its children are the workers.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.lab import Machine
from tests.lab.backend import Backend, wait_until

from vballoon.control import ControlClient

pytestmark = [pytest.mark.lab, pytest.mark.timeout(500)]

MIB = 1 << 20
MEMORY = 512


def children(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


class Killer:
    """Kills the worker of *backend* at random moments, *pause* seconds apart on average."""

    def __init__(self, backend: Backend, seed: int = 1) -> None:
        self._backend, self._random = backend, random.Random(seed)
        self.kills = 0

    def kill(self) -> None:
        for warm in children(self._backend.pid):
            for worker in children(warm):
                os.kill(worker, signal.SIGKILL)
                self.kills += 1

    @contextmanager
    def during(self, pause: float) -> Iterator[None]:
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(self._random.uniform(0, 2 * pause)):
                self.kill()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def ask(backend: Backend, command: str, **arguments: Any) -> Any:
    """Run a command, again if the worker dies meanwhile."""
    last: Exception | None = None
    for _ in range(200):
        try:
            with ControlClient(backend.control_socket, timeout=20) as client:
                return client.execute(command, arguments)
        except Exception as error:
            if "negotiated" in str(error) or "no guest memory" in str(error):
                raise
            last = error
    raise AssertionError(f"{command}: {last!r}")


def balloon(backend: Backend, target: int) -> None:
    ask(backend, "balloon", value=target)
    wait_until(lambda: ask(backend, "query-balloon")["actual"] == target, timeout=90)


@pytest.mark.parametrize("turns", [1, pytest.param(4, marks=pytest.mark.full)])
def test_kills_are_invisible(turns: int) -> None:
    with ExitStack() as stack:
        backend = stack.enter_context(Backend("vhost-user", "--restart-limit", "1000000"))
        killer = Killer(backend)
        with killer.during(0.4):  # firmware, kernel, no driver yet
            vm = stack.enter_context(Machine(memory=MEMORY, extra=backend.device("q35")))
        lived_through(vm, backend, killer, turns)
        print(f"{killer.kills} kills")
        assert killer.kills >= 15 * turns


def lived_through(vm: Machine, backend: Backend, killer: Killer, turns: int) -> None:
    vm.guest.sh("keeper make /tmp/kept 48")
    with killer.during(0.05):
        vm.guest.load("virtio_balloon")
    vm.guest.report_everything()
    size = ask(backend, "query-balloon")["actual"]
    with killer.during(0.25):  # inflate, deflate, configuration writes, commands
        for _ in range(turns):
            balloon(backend, size - 128 * MIB)
            balloon(backend, size)
    with killer.during(0.1):
        vm.guest.start("memhog 100", log="/run/hog.log", fifo="/run/hog")
        vm.guest.wait_for("grep -q filled /run/hog.log")
        vm.guest.sh("echo free >/run/hog")
        for _ in range(2 * turns):
            ask(backend, "start-hinting")
    before = vm.resident()
    vm.guest.start("memhog 100", log="/run/hog2.log", fifo="/run/hog2")
    vm.guest.wait_for("grep -q filled /run/hog2.log")
    vm.guest.sh("echo free >/run/hog2")
    wait_until(lambda: vm.resident() <= before + 16 * MIB, timeout=60)  # reporting still works
    balloon(backend, size - 64 * MIB)
    balloon(backend, size)
    assert vm.guest.sh("keeper check /tmp/kept").startswith("good")
    log = vm.guest.sh("dmesg")
    assert re.findall(r".*(?:BUG:|Oops|Call Trace|virtio\S*: \S* ?(?:error|failed)).*", log) == []
    assert "queue" not in backend.words(), backend.words()
