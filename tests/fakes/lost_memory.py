# SPDX-License-Identifier: Apache-2.0
"""Cases of test_memory_lost.py, each run as ``python -m tests.fakes.lost_memory CASE FOLDER``.

Each case runs in a separate process, because without the guard the process ends or hangs.
"""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

from tests.fakes.backends import Recorder, backend_thread
from tests.fakes.echo_device import EchoDevice
from tests.fakes.frontend import Frontend, Ring

from vballoon.native import guard

FULL = (1 << 64) - 2


def truncate(frontend: Frontend) -> None:
    for region in frontend.memory.regions:
        assert region.fd is not None
        os.ftruncate(region.fd, 0)


def broken_rules(events: Recorder) -> list[object]:
    return [event[2] for event in events.told if event[0] == "broken"]


def echo(frontend: Frontend) -> Ring:
    (ring,) = frontend.up()
    ident = ring.submit(b"hello", 8)
    ring.kick()
    assert ring.collect(1) == [(ident, 5)]
    return ring


def truncated(path: Path, events: Recorder) -> None:
    with Frontend.connect(path) as frontend:
        ring = echo(frontend)
        ring.submit(b"more", 8)
        truncate(frontend)
        ring.kick()
        frontend.status_ok()
        assert broken_rules(events) == ["memory-lost"], events.told
    with Frontend.connect(path) as frontend:
        echo(frontend)


def started_again(path: Path, events: Recorder) -> None:
    with Frontend.connect(path) as frontend:
        ring = echo(frontend)
        truncate(frontend)
        ring.kick()
        frontend.stop_ring(ring)
        frontend.start_ring(ring)
        frontend.status_ok()
        assert broken_rules(events) == ["memory-lost"] * 2, events.told


def blocking_call(path: Path, events: Recorder) -> None:
    with Frontend.connect(path) as frontend:
        (ring,) = frontend.up()
        fcntl.fcntl(ring.call_fd, fcntl.F_SETFL, 0)
        os.eventfd_write(ring.call_fd, FULL)
        for _ in range(3):
            ring.submit(b"hello", 8)
        ring.kick()
        ring.collect(3)
        frontend.status_ok()


CASES = {case.__name__: case for case in (truncated, started_again, blocking_call)}


def main(case: str, folder: str) -> None:
    guard.install()
    events, path = Recorder(), Path(folder) / "socket"
    with backend_thread(EchoDevice(), path=path, events=events):
        CASES[case](path, events)


if __name__ == "__main__":
    main(*sys.argv[1:])
