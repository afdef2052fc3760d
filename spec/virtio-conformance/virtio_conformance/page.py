# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML page, grouped by the sections of the specifications."""

from __future__ import annotations

import html
import re
from collections import Counter
from itertools import groupby

from virtio_conformance.record import Record, Run
from virtio_conformance.requirements import revisions
from virtio_conformance.transcript import shortened
from virtio_conformance.verdict import FAILED, WARNED, Verdict

__all__ = ("render",)

SHOWN_WIRE = (6, 14)
"""Lines of an exchange that the page shows, first and last; the JSON file has more."""
SHOWN_OUTPUT = 12
"""Last lines of a backend's output."""
WIDTH = 240
"""Characters of such a line."""

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem} h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #d0d7de}
h3{font-size:1rem;margin:1.4rem 0 .3rem;font-weight:600}
table{border-collapse:collapse;width:100%}
td,th{padding:.25rem .6rem;text-align:left;vertical-align:top}
tr{border-top:1px solid #eaeef2} .s{white-space:nowrap;font-weight:600}
.passed{color:#1a7f37} .failed{color:#cf222e} .warned{color:#9a6700} .na,.untestable{color:#6e7781}
code,pre{font:12px/1.45 ui-monospace,monospace}
pre{background:#f6f8fa;padding:.6rem;overflow-x:auto}
details{margin:.3rem 0} summary{cursor:pointer} .id{color:#57606a;font:12px ui-monospace,monospace}
"""


def render(run: Run, verdicts: list[Verdict]) -> str:
    """The page."""
    pinned = revisions()
    sources = f"virtio revision {pinned['virtio'][:8]}, QEMU's documents of {pinned['qemu']}"
    body = [
        f"<h1>Conformance of a {run.protocol} backend, device {e(run.device)}</h1>",
        f"<p><code>{e(run.backend)}</code></p>",
        f"<p>{sources}; {len(run.records)} tests in {run.seconds:.0f} s.</p>",
        _summary(verdicts),
    ]
    shown: set[str] = set()
    for chapter, rows in groupby(verdicts, key=lambda v: v.chapter):
        body.append(f"<h2>{e(chapter.title)}</h2>")
        for label, inner in groupby(rows, key=lambda v: v.row.label):
            body.append(_section(label, list(inner), shown))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>{run.protocol} conformance</title><style>{STYLE}</style>" + "\n".join(body)
    )


def e(text: str) -> str:
    """Escaped text."""
    return html.escape(text)


def _css(status: str) -> str:
    return status.replace("/", "")


def _summary(verdicts: list[Verdict]) -> str:
    counts = Counter(verdict.status for verdict in verdicts)
    cells = "".join(
        f'<td><span class="s {_css(status)}">{count}</span> {status}</td>'
        for status, count in counts.most_common()
    )
    return f"<table><tr>{cells}</tr></table>"


def _section(label: str, rows: list[Verdict], shown: set[str]) -> str:
    link = rows[0].link
    title = f'<a href="{e(link)}">{e(label)}</a>' if link else e(label)
    return f"<h3>{title}</h3><table>{''.join(_row(verdict, shown) for verdict in rows)}</table>"


def _row(verdict: Verdict, shown: set[str]) -> str:
    row = verdict.row
    why = e(row.untestable) if row.untestable else _tests(verdict, shown)
    return (
        f'<tr id="{e(row.id)}"><td class="s {_css(verdict.status)}">{verdict.status}</td>'
        f"<td class=s>{row.strength}</td><td>{e(row.text)} <span class=id>{e(row.id)}</span>"
        f"{why}</td></tr>"
    )


def _tests(verdict: Verdict, shown: set[str]) -> str:
    failed = [r for r in verdict.records if r.outcome == "failed"]
    if verdict.status in (FAILED, WARNED):
        return "".join(_failure(alike, shown) for alike in _alike(failed))
    reasons = sorted({r.observed for r in verdict.records if r.outcome == "n/a"})
    count = sum(r.outcome == "passed" for r in verdict.records)
    told = f"<br><span class=id>{count} test{'s' * (count > 1)}</span>" if count else ""
    if not count and reasons:
        told = f"<br><span class=id>{e('; '.join(reasons))}</span>"
    return told


def _alike(failed: list[Record]) -> list[list[Record]]:
    """Failures of one test function that were observed in the same words but for numbers."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in failed:
        observed = re.sub(r"0x[0-9a-f]+|\d+", "0", _first_line(record))
        groups.setdefault((record.name.partition("[")[0], observed), []).append(record)
    return list(groups.values())


def _first_line(record: Record) -> str:
    return record.observed.partition("\n")[0]


def _failure(alike: list[Record], shown: set[str]) -> str:
    """The first of the failures that are alike in full, the others by name; once on the page."""
    record = alike[0]
    title = f"<code>{e(record.name)}</code>: {e(_first_line(record))}"
    if record.name in shown:
        return f'<p><a href="#{e(record.name)}">{title}</a></p>'
    shown.add(record.name)
    parts = [f"<p>{e(record.about)}</p>", f"<pre>{e(record.observed)}</pre>"]
    if alike[1:]:
        names = ", ".join(f"<code>{e(other.name)}</code>" for other in alike[1:])
        parts.append(f"<p>In the same way: {names}</p>")
        title += f" (and {len(alike) - 1} like it)"
    if record.wire:
        lines = shortened(record.wire.splitlines(), *SHOWN_WIRE)
        parts.append(f"<p>Sent and received:</p><pre>{e(_narrow(lines))}</pre>")
    if record.backend.strip():
        lines = record.backend.strip().splitlines()[-SHOWN_OUTPUT:]
        parts.append(f"<p>The backend's output, last:</p><pre>{e(_narrow(lines))}</pre>")
    parts.append(f"<p>Again:</p><pre>{e(record.repeat)}</pre>")
    return f'<details id="{e(record.name)}"><summary>{title}</summary>{"".join(parts)}</details>'


def _narrow(lines: list[str]) -> str:
    return "\n".join(line if len(line) <= WIDTH else f"{line[:WIDTH]} ..." for line in lines)
