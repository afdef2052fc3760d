# SPDX-License-Identifier: Apache-2.0
"""What a part of the benchmarks found: samples, tables, goals, notes; and the file they live in."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tests.bench.measure import Samples

__all__ = ("Goal", "Part", "Table", "host", "load", "save")

ROOT = Path(__file__).parents[2]
DIGITS = 5


@dataclass
class Goal:
    """Something that was aimed for: *value* against *limit*, which it may not pass."""

    text: str
    value: float
    limit: float
    at_most: bool = True
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether *value* is on the right side of *limit*."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit


@dataclass
class Table:
    """Rows of numbers or words under *columns*."""

    title: str
    columns: list[str]
    rows: list[list[Any]] = field(default_factory=list)
    note: str = ""


@dataclass
class Part:
    """One part of the benchmarks: its name on the command line, and what it found."""

    name: str
    title: str
    samples: list[Samples] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def table(self, title: str, *columns: str, note: str = "") -> Table:
        """Add a table to this part and return it."""
        self.tables.append(Table(title, list(columns), note=note))
        return self.tables[-1]

    def goal(
        self, text: str, value: float, limit: float, *, at_most: bool = True, unit: str = ""
    ) -> None:
        """Judge *value*."""
        self.goals.append(Goal(text, _rounded(value), limit, at_most, unit))

    def keep(self, samples: Samples, **params: object) -> Samples:
        """Keep raw samples with the parameters that identify them."""
        samples.params.update(params)
        self.samples.append(samples)
        return samples

    def as_json(self) -> dict[str, Any]:
        """Return the part in its stored form."""
        plain = asdict(self)
        plain["goals"] = [asdict(g) | {"met": g.met} for g in self.goals]
        for entry in plain["samples"]:
            entry["values"] = [_rounded(v) for v in entry["values"]]
        return plain


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def host() -> dict[str, str]:
    """Return a description of the machine that the figures were measured on."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    from vballoon.native import native  # late: the environment decides

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return {
        "cpu": f"{os.cpu_count()} x {cpu}",
        "memory": f"{memory:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "compiled loops": "in use" if native is not None else "not in use",
    }


def run_facts(form: str) -> dict[str, Any]:
    """When, of which commit, in which form, and how busy the machine was meanwhile."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or "unknown",
        "form": form,
        "load": round(os.getloadavg()[0], 2),
    }


def load(path: Path) -> dict[str, Any]:
    """Return the record in the file *path*, or an empty record."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    return {"parts": {}}


def save(path: Path, parts: list[Part], form: str) -> dict[str, Any]:
    """Put *parts* into *path*, in place of earlier ones of the same name; the whole file."""
    whole = load(path)
    whole["host"] = host()
    for part in parts:
        whole["parts"][part.name] = part.as_json() | {"run": run_facts(form)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_compact(whole))
    return whole


def _compact(whole: dict[str, Any]) -> str:
    """JSON with one set of samples a line, so that a new run makes a readable difference."""
    spare: dict[str, Any] = {}
    for name, part in whole["parts"].items():
        for number, entry in enumerate(part["samples"]):
            spare[f"@{name}/{number}@"] = entry
    stripped = json.loads(json.dumps(whole))
    for name, part in stripped["parts"].items():
        part["samples"] = [f"@{name}/{n}@" for n in range(len(part["samples"]))]
    text = json.dumps(stripped, indent=1, ensure_ascii=False)
    for mark, entry in spare.items():
        text = text.replace(f'"{mark}"', json.dumps(entry, ensure_ascii=False))
    return text + "\n"
