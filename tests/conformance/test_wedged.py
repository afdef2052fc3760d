# SPDX-License-Identifier: Apache-2.0
"""A backend that hangs, in whatever way, costs its time limit and no more, and is a finding."""

from __future__ import annotations

import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from virtio_conformance.record import Run

ANSWER, START, TEST = 0.5, 1.0, 2.0
"""The limits given; the defaults are four times these and more."""
END = 2.0
"""What ending a program costs that does not heed SIGTERM."""
SLACK = 3.0
"""A busy machine, and starting Python."""

BACKEND = """
import signal, socket, sys, time
how, path = sys.argv[1:]
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if how == "absent":
    time.sleep(60)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
if how == "deaf":
    time.sleep(60)
peer = listener.accept()[0]
if how == "drips":  # a reply to GET_FEATURES whose end never comes
    reply = (1).to_bytes(4, "little") + (5).to_bytes(4, "little") + (8).to_bytes(4, "little")
    for byte in reply + bytes(7):
        peer.send(bytes([byte]))
        time.sleep(0.1)
elif how == "stops":  # after the handshake
    for answer in range(3):
        number = int.from_bytes(peer.recv(12)[:4], "little")
        peer.send(number.to_bytes(4, "little") + (5).to_bytes(4, "little") +
                  (8).to_bytes(4, "little") + (1 << 30 | 1 << 32).to_bytes(8, "little"))
time.sleep(60)
"""
TESTS = ("test_vhost_user_rings.py::test_silence_when_stopped[split]",
         "test_vhost_user_messages.py::test_random_bytes[0]")  # fmt: skip


WAYS = ("absent", "deaf", "silent", "drips", "stops")


def conform(how: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The suite over a backend that hangs in this way."""
    program = folder / f"{how}.py"
    program.write_text(BACKEND, encoding="utf-8")
    spawn = f"{shlex.join([sys.executable, str(program), how])} {{socket}}"
    command = [sys.executable, "-m", "virtio_conformance.run", "--spawn", spawn]
    command += ["--device", "balloon", "--json", str(folder / f"{how}.json")]
    command += ["--answer-limit", str(ANSWER), "--start-limit", str(START)]
    command += ["--time-limit", str(TEST)]
    for test in TESTS:
        command += ["--only", test]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, Run]]:
    """Exit status and results for each way to hang; side by side, since all of it is waiting."""
    folder = tmp_path_factory.mktemp("wedged")
    with ThreadPoolExecutor(len(WAYS)) as pool:
        done = dict(zip(WAYS, pool.map(lambda how: conform(how, folder), WAYS), strict=True))
    return {how: (end.returncode, Run.load(folder / f"{how}.json")) for how, end in done.items()}


@pytest.mark.parametrize("how", WAYS)
def test_a_wedged_backend_costs_its_time_limit(ended: dict[str, tuple[int, Run]], how: str) -> None:
    code, run = ended[how]
    assert code == 1
    assert len(run.records) == len(TESTS)
    assert {record.outcome for record in run.records} == {"failed"}
    assert "Hang" in run.records[0].observed
    assert all(record.seconds < START + TEST + END + SLACK for record in run.records)
