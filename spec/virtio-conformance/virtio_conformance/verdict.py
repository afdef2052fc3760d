# SPDX-License-Identifier: Apache-2.0
"""From tests to requirements: which rows of the catalogue a backend fulfils."""

from __future__ import annotations

from dataclasses import dataclass, field

from virtio_conformance.record import Record, Run
from virtio_conformance.requirements import Chapter, Requirement, chapters, index, revisions

__all__ = ("FAILED", "NOT_APPLICABLE", "PASSED", "UNTESTABLE", "WARNED", "Verdict", "verdicts")

PASSED, WARNED, FAILED = "passed", "warned", "failed"
NOT_APPLICABLE, UNTESTABLE = "n/a", "untestable"
SOURCES = {
    "virtio_basic": "content.tex",
    "virtio_split": "split-ring.tex",
    "virtio_packed": "packed-ring.tex",
    "virtio_pci": "transport-pci.tex",
    "virtio_balloon": "device-types/balloon/description.tex",
}
MANUAL = "https://www.qemu.org/docs/master/interop"


@dataclass
class Verdict:
    """One row, and what this run says about it."""

    row: Requirement
    chapter: Chapter
    status: str = NOT_APPLICABLE
    records: list[Record] = field(default_factory=list)

    @property
    def binding(self) -> bool:
        """Whether breaking it breaks the standard (MUST), not only its advice."""
        return self.row.strength.startswith("MUST")

    @property
    def link(self) -> str:
        """Where the statement stands."""
        name = self.chapter.name
        if name in SOURCES:
            block = index()[name].get(self.row.label, {})
            anchor = f"#L{block['line']}" if block.get("line") else ""
            base = "https://github.com/oasis-tcs/virtio-spec/blob"
            return f"{base}/{revisions()['virtio']}/{SOURCES[name]}{anchor}"
        return f"{MANUAL}/{self.chapter.specification}.html" if name != "robustness" else ""


def verdicts(run: Run) -> list[Verdict]:
    """Every row of the chapters that concern the transport, in the catalogue's order."""
    by_row: dict[str, list[Record]] = {}
    for record in run.records:
        for requirement in record.requirements:
            by_row.setdefault(requirement, []).append(record)
    found = [
        Verdict(row, chapter, records=by_row.get(row.id, []))
        for chapter in chapters()
        for row in chapter.rows
        if _concerns(chapter, run)
    ]
    for verdict in found:
        verdict.status = _status(verdict)
    return found


def _concerns(chapter: Chapter, run: Run) -> bool:
    if chapter.specification in ("vhost-user", "vfio-user"):
        return chapter.specification == run.protocol
    return chapter.name != "virtio_pci" or run.protocol == "vfio-user"


def _status(verdict: Verdict) -> str:
    outcomes = {record.outcome for record in verdict.records}
    if verdict.row.untestable:
        return UNTESTABLE
    if "failed" in outcomes:
        return FAILED if verdict.binding else WARNED
    return PASSED if "passed" in outcomes else NOT_APPLICABLE
