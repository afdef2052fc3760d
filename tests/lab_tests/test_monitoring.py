# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus beside a real guest: figures arrive, change, and raise alerts."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from tests.lab import Machine
from tests.lab.backend import Backend, wait_until
from tests.lab.prometheus import Prometheus, program

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

MIB = 1 << 20
MEMORY = 512
ALERTS = Path(__file__).parents[2] / "examples/monitoring/alerts.yml"


def test_promtool_accepts_the_alerts() -> None:
    done = subprocess.run([program("promtool"), "check", "rules", ALERTS], capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_scrapes_a_guest_and_a_server_that_is_gone(tmp_path: Path) -> None:
    with (
        Backend("vhost-user") as backend,
        Machine(memory=MEMORY, extra=backend.device("q35")) as vm,
    ):
        vm.guest.load("virtio_balloon")
        words = [f"web={backend.control_socket}", f"gone={tmp_path / 'none'}"]
        scraped = subprocess.Popen(
            [sys.executable, "-m", "vballoon", "metrics", "--listen", "127.0.0.1:0", *words],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert scraped.stdout is not None
            url = scraped.stdout.readline().split()[-1]
            with urllib.request.urlopen(url, timeout=60) as answer:
                page = answer.read()
            checked = subprocess.run([program("promtool"), "check", "metrics"], input=page)
            assert checked.returncode == 0
            with Prometheus(tmp_path, url.split("/")[2], ALERTS) as prometheus:
                wait_until(lambda: prometheus.query("vballoon_up") == {"web": 1, "gone": 0})
                size = prometheus.query("vballoon_actual_bytes")["web"]
                backend.ctl("set-guest-stats-interval", seconds=1)
                backend.ctl("balloon", value=int(size) - 64 * MIB)
                wait_until(
                    lambda: prometheus.query("vballoon_actual_bytes") == {"web": size - 64 * MIB}
                )
                wait_until(lambda: "web" in prometheus.query("vballoon_guest_available_bytes"))
                assert 0 < prometheus.query("vballoon_resident_bytes")["web"] <= MEMORY * MIB
                wait_until(lambda: prometheus.alerts().get("VballoonUnreachable") == "pending")
        finally:
            scraped.terminate()
            scraped.communicate(timeout=60)
