# SPDX-License-Identifier: Apache-2.0
"""A front-end takes guest memory away, or makes its eventfds block: the back-end lives on.

Each case runs in a process of its own, because without the guard that process ends or hangs.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from tests.roots import REPOSITORY

PRELUDE = """
import fcntl, os, sys, time
from tests.fakes.backends import Recorder, backend_thread
from tests.fakes.echo_device import EchoDevice
from tests.fakes.frontend import Frontend
from vballoon.native import guard
guard.install()
path = sys.argv[1] + "/s"
events = Recorder()

def truncate(frontend):
    for region in frontend.memory.regions:
        os.ftruncate(region.fd, 0)

def broken():
    return [told for told in events.told if told[0] == "broken"]

def echo(frontend):
    (ring,) = frontend.up()
    ident = ring.submit(b"hello", 8)
    ring.kick()
    assert ring.collect(1) == [(ident, 5)]
    return ring
"""


def run(text: str, folder) -> None:
    script = PRELUDE + textwrap.dedent(text)
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], cwd=REPOSITORY,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)


def test_truncated_guest_memory_breaks_the_rings_and_nothing_else(tmp_path):
    run(
        """
        with backend_thread(EchoDevice(), path=path, events=events):
            with Frontend.connect(path) as frontend:
                ring = echo(frontend)
                ring.submit(b"more", 8)
                truncate(frontend)
                ring.kick()
                frontend.status_ok()
                assert [b[2] for b in broken()] == ["memory-lost"], events.told
            with Frontend.connect(path) as frontend:
                echo(frontend)
        """,
        tmp_path,
    )


def test_rings_do_not_start_again_in_lost_memory(tmp_path):
    run(
        """
        with backend_thread(EchoDevice(), path=path, events=events):
            with Frontend.connect(path) as frontend:
                ring = echo(frontend)
                truncate(frontend)
                ring.kick()
                frontend.stop_ring(ring)
                frontend.start_ring(ring)
                frontend.status_ok()
                assert [b[2] for b in broken()] == ["memory-lost"] * 2, events.told
        """,
        tmp_path,
    )


@pytest.mark.parametrize("count", [(1 << 64) - 2, 0])
def test_a_call_eventfd_that_blocks_does_not_stop_the_loop(tmp_path, count):
    run(
        f"""
        with backend_thread(EchoDevice(), path=path, events=events):
            with Frontend.connect(path) as frontend:
                (ring,) = frontend.up()
                fcntl.fcntl(ring.call_fd, fcntl.F_SETFL, 0)
                if {count}:
                    os.eventfd_write(ring.call_fd, {count})
                for _ in range(3):
                    ring.submit(b"hello", 8)
                ring.kick()
                assert len(ring.collect(3)) == 3
                frontend.status_ok()
        """,
        tmp_path,
    )
