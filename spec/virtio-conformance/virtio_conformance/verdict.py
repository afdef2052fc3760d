# SPDX-License-Identifier: Apache-2.0
"""Derive the status of each requirement from the results of its tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from virtio_conformance.record import FAILED as TEST_FAILED
from virtio_conformance.record import INCONCLUSIVE, Record, Run
from virtio_conformance.record import PASSED as TEST_PASSED
from virtio_conformance.requirements import Chapter, Requirement, by_id, chapters, index, revisions

__all__ = (
    "ADVISED",
    "FAILED",
    "FRAGILE",
    "NOT_APPLICABLE",
    "PASSED",
    "STATUSES",
    "UNDECIDED",
    "UNTESTABLE",
    "WARNED",
    "Verdict",
    "exit_status",
    "verdicts",
)

FAILED, WARNED, FRAGILE, ADVISED = "failed", "warned", "fragile", "advised"
UNDECIDED, PASSED, NOT_APPLICABLE, UNTESTABLE = "not decided", "passed", "n/a", "untestable"
STATUSES = {
    FAILED: "a MUST of a specification is broken",
    WARNED: "a SHOULD of a specification is not followed",
    FRAGILE: "a malformed message, ring or request does harm; no specification forbids it",
    ADVISED: "a rule of this suite is not followed; no specification has it",
    UNDECIDED: "a test ended before it came to the row",
    PASSED: "at least one test of the row passed and none failed",
    NOT_APPLICABLE: "the row does not concern this back-end or this run",
    UNTESTABLE: "no front-end can observe it",
}
"""Status of a row, worst first, and what it means."""
_BROKEN = {"MUST": FAILED, "SHOULD": WARNED, "MAY": WARNED, "ROBUST": FRAGILE, "OURS": ADVISED}
BROKEN, FRAGILE_ONLY, INCONCLUSIVE_ONLY = 1, 3, 4
"""Exit statuses: a MUST is broken; only robustness rows are; only inconclusive tests are left."""
SOURCES = {
    "virtio_basic": "content.tex",
    "virtio_split": "split-ring.tex",
    "virtio_packed": "packed-ring.tex",
    "virtio_pci": "transport-pci.tex",
    "virtio_balloon": "device-types/balloon/description.tex",
}
MANUAL = "https://gitlab.com/qemu-project/qemu/-/blob"
"""The manual's sources; the pages on the web exist for the newest version only."""


@dataclass
class Verdict:
    """One row and its status in this run."""

    row: Requirement
    chapter: Chapter
    status: str = NOT_APPLICABLE
    records: list[Record] = field(default_factory=list)
    """The tests of the row."""
    failures: list[Record] = field(default_factory=list)
    """The tests that found the row broken."""

    @property
    def broken(self) -> bool:
        """Whether a test found the row broken, whatever its strength."""
        return bool(self.failures)

    @property
    def link(self) -> str:
        """URL of the statement in the pinned revision; empty for rules of this suite."""
        name = self.chapter.name
        if name in SOURCES:
            block = index()[name].get(self.row.label, {})
            anchor = f"#L{block['line']}" if block.get("line") else ""
            base = "https://github.com/oasis-tcs/virtio-spec/blob"
            return f"{base}/{revisions()['virtio']}/{SOURCES[name]}{anchor}"
        if name == "robustness":
            return ""
        return f"{MANUAL}/v{revisions()['qemu']}/docs/interop/{self.chapter.specification}.rst"


def verdicts(run: Run) -> list[Verdict]:
    """Return every row of the chapters that concern the transport, in the catalogue's order."""
    by_row: dict[str, list[Record]] = {}
    for record in run.records:
        for requirement in {*record.requirements, record.broken} - {""}:
            by_row.setdefault(requirement, []).append(record)
    found = [
        Verdict(row, chapter, records=by_row.get(row.id, []))
        for chapter in chapters()
        for row in chapter.rows
        if _concerns(chapter, run) and row.in_version(run.spec)
    ]
    for verdict in found:
        name = verdict.row.id
        verdict.failures = [record for record in verdict.records if record.broken == name]
        verdict.status = _status(verdict)
    return found


def exit_status(run: Run, found: list[Verdict]) -> int:
    """Return 1 if a MUST is broken; else 3 for robustness, 4 for inconclusive tests; else 0."""
    statuses = {verdict.status for verdict in found}
    if FAILED in statuses:
        return BROKEN
    if FRAGILE in statuses:
        return FRAGILE_ONLY
    open_questions = any(record.outcome == INCONCLUSIVE for record in run.records)
    return INCONCLUSIVE_ONLY if open_questions else 0


def broken_status(row: str) -> str:
    """Return the status of a row that was found broken, by its strength."""
    return _BROKEN[by_id()[row].strength.split()[0]]


def _concerns(chapter: Chapter, run: Run) -> bool:
    if chapter.specification in ("vhost-user", "vfio-user"):
        return chapter.specification == run.protocol
    return chapter.name != "virtio_pci" or run.protocol == "vfio-user"


def _status(verdict: Verdict) -> str:
    if verdict.row.untestable:
        return UNTESTABLE
    if verdict.failures:
        return broken_status(verdict.row.id)
    outcomes = {record.outcome for record in verdict.records}
    if TEST_PASSED in outcomes:
        return PASSED
    return UNDECIDED if outcomes & {TEST_FAILED, INCONCLUSIVE} else NOT_APPLICABLE
