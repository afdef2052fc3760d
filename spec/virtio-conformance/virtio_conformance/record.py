# SPDX-License-Identifier: Apache-2.0
"""Keeps what every test saw, for the reports."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

__all__ = ("Record", "Recorder", "Run")


@dataclass
class Record:
    """One test."""

    name: str
    outcome: str = "passed"
    """``passed``, ``failed`` or ``n/a``."""
    seconds: float = 0.0
    requirements: list[str] = field(default_factory=list)
    observed: str = ""
    """What was found, or why the test is not applicable."""
    wire: str = ""
    backend: str = ""
    repeat: str = ""
    about: str = ""


@dataclass
class Run:
    """A whole run."""

    protocol: str
    device: str
    backend: str
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read what :class:`Recorder` wrote."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        data["records"] = [Record(**record) for record in data["records"]]
        return cls(**data)


class Recorder:
    """A pytest plugin that fills a :class:`Run` and writes it as JSON in the end."""

    def __init__(
        self,
        run: Run,
        path: Path | None = None,
        progress: Callable[[Record, int], None] | None = None,
    ) -> None:
        self.run = run
        self.path = path
        self.progress = progress
        self._open: dict[str, Record] = {}
        self._count = 0
        self._start = time.monotonic()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Learn how many tests there are, and what each is about."""
        self._count = len(session.items)
        for item in session.items:
            about = (getattr(getattr(item, "function", None), "__doc__", "") or "").strip()
            self._open[item.nodeid] = Record(item.nodeid.rpartition("/")[2], about=about)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in one phase of one test."""
        record = self._open.setdefault(report.nodeid, Record(report.nodeid.rpartition("/")[2]))
        record.seconds += report.duration
        properties: dict[str, Any] = dict(report.user_properties)
        record.requirements = list(properties.get("requirement", record.requirements))
        if report.failed and record.outcome != "failed":
            record.outcome = "failed"
            record.observed = str(report.longrepr)[-3000:]
            sections = dict(report.sections)
            record.wire, record.backend = sections.get("wire", ""), sections.get("backend", "")
            record.repeat = sections.get("repeat", "")
        elif report.skipped and record.outcome == "passed":
            record.outcome = "n/a"
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            record.observed = reason.removeprefix("Skipped: ").removeprefix("n/a: ")
        if report.when == "teardown":
            self.run.records.append(record)
            if self.progress:
                self.progress(record, self._count)

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        self.run.seconds = time.monotonic() - self._start
        if self.path:
            text = json.dumps(asdict(self.run), indent=1, ensure_ascii=False)
            self.path.write_text(text + "\n", encoding="utf-8")
