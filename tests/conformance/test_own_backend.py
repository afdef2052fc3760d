# SPDX-License-Identifier: Apache-2.0
"""The suite over our own back-end: both transports, both ring layouts, both engines.

The command is run as a user runs it, in slices side by side: most of a test is waiting for
something that must not happen.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.roots import SUITE

from virtio_conformance.record import Run

pytestmark = pytest.mark.timeout(600)  # all of it waits in the first test's fixture
AT_ONCE = 4
FEATURES = "+RING_PACKED,+IN_ORDER,+EVENT_IDX,+INDIRECT_DESC"
ONE_TRANSPORT = {
    "test_vhost_user": "vhost-user",
    "test_vfio_user": "vfio-user",
    "test_pci": "vfio-user",
}
BY_ENGINE = ("test_ring_requests.py", "test_ring_notify.py", "test_balloon_queues.py")
"""Files that are run over the scalar engine too: what it does otherwise is in there."""
LEAST = {("vhost-user", "batch"): 600, ("vfio-user", "batch"): 550}
"""Tests that have to pass at least, else something has been left out silently."""
ADVISORY = {"vu.log.exact"}
"""Rules of the suite that the device does not follow: where it has no atomic OR at hand it marks
the eight pages of a byte of the dirty log."""


@dataclass(frozen=True)
class Slice:
    """A part of the suite, on one transport and engine."""

    protocol: str
    engine: str
    files: tuple[str, ...]

    def run(self, results: Path) -> Run:
        """Return the outcome."""
        serve = f"vballoon serve --{self.protocol} {{socket}} --control {{dir}}/control"
        command = [sys.executable, "-m", "virtio_conformance.run", "--keep"]
        command += ["--spawn", f"{serve} --engine {self.engine} --features={FEATURES}"]
        command += ["--config-change", "vballoon ctl {dir}/control balloon value={n}M force=on"]
        command += ["--hint-start", "vballoon ctl {dir}/control start-hinting"]
        command += ["--hint-done", "vballoon ctl {dir}/control stop-hinting"]
        command += ["--protocol", self.protocol, "--device", "balloon", "--json", str(results)]
        command += ["--answer-limit", "6", "--time-limit", "30"]  # a busy machine is no finding
        for file in self.files:
            command += ["--only", file]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            command, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=500
        )
        assert results.exists(), done.stdout + done.stderr
        return Run.load(results)


def slices() -> list[Slice]:
    """All of the suite on the batch engine, the rings' files on the other too; long ones first."""
    found: list[Slice] = []
    for protocol in ("vhost-user", "vfio-user"):
        files = sorted(
            path.name
            for path in SUITE.glob("test_*.py")
            if all(
                protocol == only or not path.name.startswith(start)
                for start, only in ONE_TRANSPORT.items()
            )
        )
        long = [name for name in files if "malformed" in name or "user_messages" in name]
        rest = [name for name in files if name not in long]
        found += [Slice(protocol, "batch", (name,)) for name in long]
        found += [Slice(protocol, "batch", tuple(rest[i::2])) for i in range(2)]
        found.append(Slice(protocol, "scalar", BY_ENGINE))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Run]]:
    """Every slice, by transport and engine."""
    folder = tmp_path_factory.mktemp("conformance")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures: list[tuple[Slice, Future[Run]]] = [
            (part, pool.submit(part.run, folder / f"{number}.json"))
            for number, part in enumerate(slices())
        ]
    found: dict[tuple[str, str], list[Run]] = {}
    for part, future in futures:
        found.setdefault((part.protocol, part.engine), []).append(future.result())
    return found


@pytest.mark.parametrize("engine", ["batch", "scalar"])
@pytest.mark.parametrize("protocol", ["vhost-user", "vfio-user"])
def test_every_applicable_row_passes(
    runs: dict[tuple[str, str], list[Run]], protocol: str, engine: str
) -> None:
    records = [record for run in runs[protocol, engine] for record in run.records]
    failed = [
        f"{r.name}: {r.broken}: {r.observed}\n  {r.repeat}"
        for r in records
        if r.outcome in ("failed", "inconclusive") and r.broken not in ADVISORY
    ]
    assert not failed, "\n".join(failed)
    passed = sum(record.outcome == "passed" for record in records)
    assert passed >= LEAST.get((protocol, engine), 100)
