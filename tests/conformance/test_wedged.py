# SPDX-License-Identifier: Apache-2.0
"""A back-end that hangs, in whatever way, costs its time limit and accuses nobody."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
TESTS = (
    "test_vhost_user_rings.py::test_silence_when_stopped[split]",
    "test_vhost_user_messages.py::test_random_bytes[0]",
)


WAYS = ("absent", "deaf", "silent", "drips", "stops")


def conform(how: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the suite on a back-end that hangs in this way."""
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


@dataclass(frozen=True)
class End:
    """How a run ended."""

    code: int
    text: str
    seconds: float
    run: Run | None


def timed(how: str, folder: Path) -> End:
    """Run the suite, and look at the clock."""
    begin = time.monotonic()
    done = conform(how, folder)
    seconds = time.monotonic() - begin
    results = folder / f"{how}.json"
    run = Run.load(results) if results.exists() else None
    return End(done.returncode, done.stdout + done.stderr, seconds, run)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, End]:
    """How each run ended; side by side, since all of it is waiting."""
    folder = tmp_path_factory.mktemp("wedged")
    with ThreadPoolExecutor(len(WAYS)) as pool:
        return dict(zip(WAYS, pool.map(lambda how: timed(how, folder), WAYS), strict=True))


@pytest.mark.parametrize("how", ["absent", "deaf", "silent", "drips"])
def test_a_backend_that_never_answers_ends_the_run(ended: dict[str, End], how: str) -> None:
    end = ended[how]
    assert end.code == 2
    assert end.run is None
    (line,) = end.text.strip().splitlines()
    assert line.startswith("nothing was tested: ")
    assert "within 1 s" in line or "no answer" in line
    assert end.seconds < 8 * START + END + SLACK


def test_a_backend_that_stops_in_set_up_is_inconclusive(ended: dict[str, End]) -> None:
    end = ended["stops"]
    assert end.code == 3, end.text  # after noise it serves nobody, which is not robust
    assert end.run is not None
    assert len(end.run.records) == len(TESTS)
    first = next(r for r in end.run.records if "silence" in r.name)
    assert first.outcome == "inconclusive"
    assert not first.broken
    assert "Hang" in first.observed
    assert all(record.seconds < 3 * START + TEST + END + SLACK for record in end.run.records)
