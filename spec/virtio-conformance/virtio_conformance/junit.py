# SPDX-License-Identifier: Apache-2.0
"""JUnit XML with everything that people need of a failure, for CI systems."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter

from virtio_conformance.record import FAILED, INCONCLUSIVE, NOT_APPLICABLE, Record, Run
from virtio_conformance.requirements import by_id
from virtio_conformance.verdict import broken_status

__all__ = ("render_junit",)

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML cannot carry, not even escaped."""


def render_junit(run: Run) -> str:
    """Return the run as one test suite."""
    counts = Counter(record.outcome for record in run.records)
    suite = ET.Element(
        "testsuite",
        name=f"virtio-conformance {run.protocol} {run.device}",
        tests=str(len(run.records)),
        failures=str(counts[FAILED]),
        errors=str(counts[INCONCLUSIVE]),
        skipped=str(counts[NOT_APPLICABLE]),
        time=f"{run.seconds:.3f}",
        timestamp=run.date,
    )
    facts = ET.SubElement(suite, "properties")
    for name in ("backend", "suite", "catalogue", "spec", "features", "protocol_features"):
        ET.SubElement(facts, "property", name=name, value=_clean(str(getattr(run, name))))
    for record in run.records:
        suite.append(_case(record))
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _case(record: Record) -> ET.Element:
    file, _, name = record.name.partition("::")
    case = ET.Element("testcase", classname=file, name=_clean(name), time=f"{record.seconds:.3f}")
    first = _clean(record.observed.partition("\n")[0])
    if record.outcome == NOT_APPLICABLE:
        ET.SubElement(case, "skipped", message=first)
    elif record.outcome == INCONCLUSIVE:
        ET.SubElement(case, "error", message=first, type=INCONCLUSIVE).text = _text(record)
    elif record.outcome == FAILED:
        kind = f"{broken_status(record.broken)} {record.broken}"
        ET.SubElement(case, "failure", message=first, type=kind).text = _text(record)
    return case


def _text(record: Record) -> str:
    """Return all that is known of a failure."""
    row = by_id().get(record.broken)
    parts = [f"tested: {record.about}"]
    if row is not None:
        parts += [f"expected: {row.text} ({row.id}, {row.strength}; {row.label})", row.source]
    parts += [f"found: {record.observed}"]
    for title in ("rings", "wire", "backend"):
        text = getattr(record, title).strip()
        parts += [f"{title}:\n{text}"] if text else []
    return _clean("\n".join([*filter(None, parts), f"again: {record.repeat}"]))


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
