# SPDX-License-Identifier: Apache-2.0
"""No false accusation: an independent balloon passes with either numbering of its queues."""

from __future__ import annotations

import shlex
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from virtio_conformance.record import Run
from virtio_conformance.verdict import exit_status, verdicts

pytestmark = pytest.mark.timeout(600)  # both runs are in the first test's fixture
PROGRAM = Path(__file__).parent / "others" / "plain_balloon.py"
NUMBERINGS = {"fixed": "as the standard does", "dense": "as Linux does"}
FILES = (
    "test_balloon.py",
    "test_balloon_queues.py",
    "test_balloon_acknowledged.py",
    "test_features.py",
    "test_ring_requests.py",
    "test_vhost_user_rings.py",
    "test_vhost_user_reuse.py",
)
"""Test files whose result depends on the numbering or on an interpretation of the standard."""
LEAST = 130


def judge(numbering: str, results: Path) -> Run:
    """Run :data:`FILES` against the balloon with this numbering, and return the results."""
    spawn = shlex.join([sys.executable, str(PROGRAM), "--numbering", numbering])
    command = [sys.executable, "-m", "virtio_conformance.run", "--spawn", f"{spawn} {{socket}}"]
    command += ["--device", "balloon", "--json", str(results), "--jobs", "2"]
    command += ["--answer-limit", "6", "--time-limit", "30"]  # a busy machine is no finding
    for file in FILES:
        command += ["--only", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert results.exists(), done.stdout + done.stderr
    return Run.load(results)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Return the results of both runs, which are parallel because a test mostly waits."""
    folder = tmp_path_factory.mktemp("plain")
    with ThreadPoolExecutor(2) as pool:
        futures: dict[str, Future[Run]] = {
            name: pool.submit(judge, name, folder / f"{name}.json") for name in NUMBERINGS
        }
    return {name: future.result() for name, future in futures.items()}


@pytest.mark.parametrize("numbering", NUMBERINGS)
def test_a_balloon_true_to_its_numbering_is_not_accused(
    runs: dict[str, Run], numbering: str
) -> None:
    run = runs[numbering]
    failed = {
        record.name: record.broken
        for record in run.records
        if record.outcome in ("failed", "inconclusive")
    }
    assert failed == {"test_balloon_queues.py::test_numbering": "balloon.queues.numbering"}
    assert exit_status(run, verdicts(run)) == 0
    assert any(NUMBERINGS[numbering] in note for note in run.notes)
    assert sum(record.outcome == "passed" for record in run.records) >= LEAST
