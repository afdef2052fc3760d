# SPDX-License-Identifier: Apache-2.0
"""Keeps what every test saw, for the reports."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from virtio_conformance.requirements import VERSION, revisions

__all__ = ("FAILED", "INCONCLUSIVE", "NOT_APPLICABLE", "PASSED", "Record", "Recorder", "Run")

PASSED, FAILED, INCONCLUSIVE, NOT_APPLICABLE = "passed", "failed", "inconclusive", "n/a"
SCHEMA = 2
"""Version of the JSON file; ``results.schema.json`` describes it."""


@dataclass
class Record:
    """One test."""

    name: str
    outcome: str = PASSED
    """``passed``, ``failed``, ``inconclusive`` (it ended before its check) or ``n/a``."""
    seconds: float = 0.0
    requirements: list[str] = field(default_factory=list)
    """Rows that the test checks."""
    broken: str = ""
    """The row that it found broken."""
    observed: str = ""
    """What was found, or why the test is not applicable."""
    wire: str = ""
    rings: str = ""
    """Chains as they were published, and the rings as they stood at the failure."""
    backend: str = ""
    """The last output of the back-end."""
    repeat: str = ""
    about: str = ""
    note: str = ""
    """What the test learned about the back-end besides its verdict."""


def _suite_version() -> str:
    try:
        return importlib.metadata.version("virtio-conformance")
    except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
        return "unknown"


@dataclass
class Run:
    """A whole run."""

    protocol: str
    device: str
    backend: str
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list)
    spec: str = "1.4"
    features: str = ""
    """Feature bits that the back-end offers, in hexadecimal."""
    protocol_features: str = ""
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )
    schema: int = SCHEMA
    suite: str = field(default_factory=_suite_version)
    catalogue: str = VERSION
    specifications: dict[str, str] = field(default_factory=revisions)

    @classmethod
    def load(cls, path: Path) -> Run:
        """Return what :meth:`save` wrote; raise :class:`ValueError` for any other file."""
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"{path}: no result file of schema {SCHEMA}")
        data["records"] = [Record(**record) for record in data["records"]]
        return cls(**data)

    @property
    def notes(self) -> list[str]:
        """What the tests learned about the back-end besides their verdicts."""
        return sorted({record.note for record in self.records} - {""})

    def save(self, path: Path) -> None:
        """Write the run as JSON."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


class Recorder:
    """A pytest plugin that fills a :class:`Run` and writes it as JSON at the end."""

    def __init__(
        self,
        run: Run,
        path: Path | None = None,
        progress: Callable[[Record, int], None] | None = None,
    ) -> None:
        self.run = run
        self.path = path
        self.progress = progress
        self.count = 0
        """Tests that were collected."""
        self._open: dict[str, Record] = {}
        self._start = time.monotonic()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Learn how many tests there are, and what each is about."""
        self.count = len(session.items)
        for item in session.items:
            about = (getattr(getattr(item, "function", None), "__doc__", "") or "").strip()
            self._open[item.nodeid] = Record(item.nodeid.rpartition("/")[2], about=about)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in one phase of one test."""
        record = self._open.setdefault(report.nodeid, Record(report.nodeid.rpartition("/")[2]))
        record.seconds += report.duration
        properties: dict[str, Any] = dict(report.user_properties)
        record.requirements = list(properties.get("requirement", record.requirements))
        record.note = str(properties.get("note", record.note))
        if report.failed and record.outcome not in (FAILED, INCONCLUSIVE):
            _failed(record, report, str(properties.get("broken", "")))
        elif report.skipped and record.outcome == PASSED:
            record.outcome = NOT_APPLICABLE
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            record.observed = reason.removeprefix("Skipped: ").removeprefix("n/a: ")
        if report.when == "teardown":
            self.run.records.append(record)
            if self.progress:
                self.progress(record, self.count)

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        self.run.seconds = time.monotonic() - self._start
        if self.path:
            self.run.save(self.path)


def _failed(record: Record, report: pytest.TestReport, broken: str) -> None:
    """Take over what the plugin attached to a failure."""
    record.outcome = FAILED if broken else INCONCLUSIVE
    record.broken = broken
    record.observed = str(report.longrepr)[-3000:]
    sections = dict(report.sections)
    record.wire, record.backend = sections.get("wire", ""), sections.get("backend", "")
    record.rings, record.repeat = sections.get("rings", ""), sections.get("repeat", "")
