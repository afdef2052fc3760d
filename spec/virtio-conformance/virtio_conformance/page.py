# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML page: what is broken first, then every row by chapter."""

from __future__ import annotations

import html
import re
from collections import Counter
from itertools import groupby

from virtio_conformance.page_style import SCRIPT, STYLE
from virtio_conformance.record import FAILED as TEST_FAILED
from virtio_conformance.record import INCONCLUSIVE, NOT_APPLICABLE, PASSED, Record, Run
from virtio_conformance.transcript import shortened
from virtio_conformance.verdict import (
    ADVISED,
    FAILED,
    FRAGILE,
    STATUSES,
    WARNED,
    Verdict,
)

__all__ = ("render",)

SHOWN_WIRE = (6, 14)
"""Lines of an exchange that the page shows, first and last; the JSON file has more."""
SHOWN_OUTPUT = 12
"""Last lines of the output of a back-end."""
WIDTH = 240
"""Characters of such a line."""


def render(run: Run, verdicts: list[Verdict]) -> str:
    """Return the page, which needs no other file."""
    title = f"Conformance of a {run.protocol} back-end, device {run.device}"
    body = [
        f"<h1>{e(title)}</h1>",
        _facts(run),
        _filter(verdicts),
        *_failures(verdicts),
        *_inconclusive(run),
        "<h2>All requirements</h2>",
    ]
    for chapter, rows in groupby(verdicts, key=lambda v: v.chapter):
        body.append(_chapter(chapter.title, list(rows)))
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{e(title)}</title><style>{STYLE}</style></head><body>"
        + "\n".join(body)
        + f"<script>{SCRIPT}</script></body></html>\n"
    )


def e(text: str) -> str:
    """Return *text* escaped for HTML."""
    return html.escape(text)


def _css(status: str) -> str:
    return "undecided" if status == "not decided" else status.replace("/", "")


def _chip(status: str, text: str = "") -> str:
    meaning = e(STATUSES[status])
    return f'<span class="chip {_css(status)}" title="{meaning}">{e(text or status)}</span>'


def _facts(run: Run) -> str:
    """Return a list of what was tested, with what, when, and the counts of results."""
    counts = Counter(record.outcome for record in run.records)
    told = ", ".join(
        f"{counts[outcome]} {'not applicable' if outcome == NOT_APPLICABLE else outcome}"
        for outcome in (PASSED, TEST_FAILED, INCONCLUSIVE, NOT_APPLICABLE)
    )
    sources = ", ".join(f"{name} {text[:12]}" for name, text in run.specifications.items())
    features = f"<code>{e(run.features or 'unknown')}</code>"
    if run.protocol_features:
        features += f", protocol features <code>{e(run.protocol_features)}</code>"
    entries = [
        ("back-end", f"<code>{e(run.backend)}</code>"),
        ("offers", features),
        ("run", f"{e(run.date)}, {run.seconds:.0f} s; tests: {told}"),
        (
            "versions",
            (
                f"suite {e(run.suite)}, catalogue {e(run.catalogue)}, sources {e(sources)},"
                f" virtio {e(run.spec)}"
            ),
        ),
        *(("note", e(note)) for note in run.notes),
    ]
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in entries) + "</dl>"


def _filter(verdicts: list[Verdict]) -> str:
    """Return a search field, and a box for each status with its count."""
    counts = Counter(verdict.status for verdict in verdicts)
    boxes = "".join(
        f'<label><input type=checkbox name="{status}" checked>'
        f" {_chip(status, f'{counts[status]} {status}')}</label>"
        for status in STATUSES
        if counts[status]
    )
    field = '<input type=search id=words placeholder="filter by words" aria-label="filter">'
    return f"<div class=filter>{field}{boxes}</div>"


# -- what is broken --------------------------------------------------------------------------


def _failures(verdicts: list[Verdict]) -> list[str]:
    """Return one card for each broken row, the worst first."""
    parts: list[str] = []
    for status in (FAILED, WARNED, FRAGILE, ADVISED):
        broken = [verdict for verdict in verdicts if verdict.status == status]
        if broken:
            meaning = STATUSES[status]
            parts.append(f"<h2>{_chip(status)} {e(meaning[0].upper() + meaning[1:])}</h2>")
            parts += [_card(verdict) for verdict in broken]
    if not parts:
        parts.append("<p>No requirement is broken.</p>")
    return parts


def _card(verdict: Verdict) -> str:
    """Return a card for a broken row: the expectation, its source, and what was found."""
    row = verdict.row
    where = e(row.label)
    if verdict.link:
        where = f'<a href="{e(verdict.link)}">{where}</a>'
    source = f"; <span class=soft>{e(row.source)}</span>" if row.source else ""
    found = "".join(_failure(alike) for alike in _alike(verdict.failures))
    return (
        f'<div class=card id="broken-{e(row.id)}" data-status="{verdict.status}">'
        f"<h3>{_chip(verdict.status)} <code>{e(row.id)}</code></h3>"
        f"<dl><dt>expected</dt><dd>{e(row.text)} <span class=soft>({row.strength})</span></dd>"
        f"<dt>source</dt><dd>{where}{source}</dd></dl>"
        f"{found}</div>"
    )


def _alike(failed: list[Record]) -> list[list[Record]]:
    """Group failures of one test function that were observed in the same words but for numbers."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in failed:
        observed = re.sub(r"0x[0-9a-f]+|\d+", "0", _first_line(record))
        groups.setdefault((record.name.partition("[")[0], observed), []).append(record)
    return list(groups.values())


def _first_line(record: Record) -> str:
    return record.observed.partition("\n")[0].removeprefix("Finding: ")


def _failure(alike: list[Record]) -> str:
    """Return the first of similar failures in full, and the names of the others."""
    record = alike[0]
    title = f"<b>found</b> {e(_first_line(record))}"
    if alike[1:]:
        title += f" (and {len(alike) - 1} like it)"
    parts = [f"<p><code>{e(record.name)}</code>: {e(record.about)}</p>"]
    if "\n" in record.observed:
        parts.append(f"<pre>{e(record.observed)}</pre>")
    if alike[1:]:
        names = ", ".join(f"<code>{e(other.name)}</code>" for other in alike[1:])
        parts.append(f"<p>In the same way: {names}</p>")
    parts += _evidence(record)
    output = record.backend.strip().splitlines()[-1:]
    last = f"<p class=soft>last output: <code>{e(_narrow(output))}</code></p>" if output else ""
    body = "".join(parts)
    return f'<details id="{e(record.name)}"><summary>{title}</summary>{body}</details>{last}'


def _evidence(record: Record) -> list[str]:
    """Return rings, messages and output, and the command that repeats the test."""
    parts: list[str] = []
    if record.rings.strip():
        parts.append(f"<p>Rings:</p><pre>{e(_narrow(record.rings.splitlines()))}</pre>")
    if record.wire:
        lines = shortened(record.wire.splitlines(), *SHOWN_WIRE)
        parts.append(f"<p>Sent and received:</p><pre>{e(_narrow(lines))}</pre>")
    if record.backend.strip():
        lines = record.backend.strip().splitlines()[-SHOWN_OUTPUT:]
        parts.append(f"<p>Last output of the back-end:</p><pre>{e(_narrow(lines))}</pre>")
    parts.append(f"<p>Again:</p><pre>{e(record.repeat)}</pre>")
    return parts


def _narrow(lines: list[str]) -> str:
    return "\n".join(line if len(line) <= WIDTH else f"{line[:WIDTH]} ..." for line in lines)


def _inconclusive(run: Run) -> list[str]:
    """Return cards for the tests that ended before they reached a verdict."""
    records = [record for record in run.records if record.outcome == INCONCLUSIVE]
    if not records:
        return []
    cards = [
        f'<div class=card data-status="not decided">{_failure(a)}</div>' for a in _alike(records)
    ]
    return ["<h2>Inconclusive tests: they ended before they came to their question</h2>", *cards]


# -- all rows --------------------------------------------------------------------------------


def _chapter(title: str, rows: list[Verdict]) -> str:
    body = "".join(_row(verdict) for verdict in rows)
    head = "<thead><tr><th>status<th>strength<th>requirement<th>source</tr></thead>"
    return (
        f"<section class=chapter><h3>{e(title)}</h3>"
        f"<table>{head}<tbody>{body}</tbody></table></section>"
    )


def _row(verdict: Verdict) -> str:
    row = verdict.row
    where = e(row.label.rpartition(" / ")[2])
    if verdict.link:
        where = f'<a href="{e(verdict.link)}" title="{e(row.label)}">{where}</a>'
    return (
        f'<tr id="{e(row.id)}" data-status="{verdict.status}"><td>{_chip(verdict.status)}</td>'
        f"<td class=soft>{row.strength}</td>"
        f"<td>{e(row.text)} <span class=id>{e(row.id)}</span>{_why(verdict)}</td>"
        f"<td>{where}</td></tr>"
    )


def _why(verdict: Verdict) -> str:
    """Return how many tests the row has, or why there is none."""
    if verdict.row.untestable:
        return f"<br><span class=soft>{e(verdict.row.untestable)}</span>"
    if verdict.failures:
        return f'<br><a href="#broken-{e(verdict.row.id)}">what was found</a>'
    count = sum(record.outcome == PASSED for record in verdict.records)
    if count:
        return f"<br><span class=id>{count} test{'s' * (count > 1)}</span>"
    reasons = sorted({r.observed for r in verdict.records if r.outcome == NOT_APPLICABLE})
    return f"<br><span class=soft>{e('; '.join(reasons))}</span>" if reasons else ""
