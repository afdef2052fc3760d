# SPDX-License-Identifier: Apache-2.0
"""A Prometheus server from Debian's package, unpacked and not installed."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from tests.lab import cache, debs
from tests.lab.machine import _die_with_parent
from tests.lab.provision import BOOKWORM

PACKAGES = ["prometheus"]
"""One static program and ``promtool``; what they depend on is for the service."""
CONFIGURATION = """\
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: ["{rules}"]
scrape_configs: [{{job_name: vballoon, static_configs: [{{targets: ["{target}"]}}]}}]
"""


def program(name: str) -> Path:
    """Return the path of ``prometheus`` or ``promtool``; the first call downloads them."""

    def fill(path: Path) -> None:
        BOOKWORM.update()
        debs.unpack(BOOKWORM.fetch(PACKAGES), path)

    return cache.build_locked("prometheus", PACKAGES, "prometheus", fill) / "usr/bin" / name


class Prometheus:
    """``with Prometheus(...) as p``: scrapes *target* every second; ``p.query("up")`` asks it."""

    def __init__(self, folder: Path, target: str, rules: Path) -> None:
        self._folder, self._target, self._rules = folder, target, rules
        self._url = ""

    def __enter__(self) -> Prometheus:
        configuration = self._folder / "prometheus.yml"
        text = CONFIGURATION.format(rules=self._rules, target=self._target)
        configuration.write_text(text, encoding="utf-8")
        self._process = subprocess.Popen(
            [program("prometheus"), f"--config.file={configuration}", "--log.format=json",
             f"--storage.tsdb.path={self._folder / 'data'}", "--web.listen-address=127.0.0.1:0"],
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            preexec_fn=_die_with_parent,
        )  # fmt: skip
        assert self._process.stderr is not None
        for line in self._process.stderr:
            said = json.loads(line) if line.startswith("{") else {}
            if said.get("msg") == "Listening on" and "address" in said:
                self._url = f"http://{said['address']}"
            elif said.get("msg", "").startswith("Server is ready"):
                break
        assert self._url, "prometheus does not listen"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate(timeout=60)

    def query(self, expression: str) -> dict[str, float]:
        """Return the value of *expression* now, by machine."""
        words = urllib.parse.urlencode({"query": expression})
        answer = self._get(f"/api/v1/query?{words}")
        return {row["metric"].get("vm", ""): float(row["value"][1]) for row in answer["result"]}

    def alerts(self) -> dict[str, str]:
        """Return the state of every alert that is pending or firing."""
        found = self._get("/api/v1/alerts")["alerts"]
        return {alert["labels"]["alertname"]: alert["state"] for alert in found}

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self._url + path, timeout=60) as answer:
            return json.load(answer)["data"]
