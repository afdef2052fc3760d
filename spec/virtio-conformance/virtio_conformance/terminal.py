# SPDX-License-Identifier: Apache-2.0
"""The report in a terminal."""

from __future__ import annotations

from collections import Counter

from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from virtio_conformance.record import Record, Run
from virtio_conformance.requirements import by_id
from virtio_conformance.transcript import shortened
from virtio_conformance.verdict import (
    FAILED,
    NOT_APPLICABLE,
    PASSED,
    UNTESTABLE,
    WARNED,
    Verdict,
)

__all__ = ("Progress", "show")

SHOWN_WIRE = 12
"""Last lines of the exchange that are shown with a failure; the JSON file has more."""


class Progress:
    """A bar that shows how far the run is and what has failed so far."""

    def __init__(self, console: Console) -> None:
        self._bar = progress.Progress(
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.description}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._failed = 0

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def step(self, record: Record, total: int) -> None:
        """One test is done."""
        self._failed += record.outcome == "failed"
        told = f"[red]{self._failed} failed[/] " if self._failed else ""
        name = escape(record.name.partition("::")[2][:50])
        self._bar.update(self._task, total=total, advance=1, description=told + name)


def show(console: Console, run: Run, verdicts: list[Verdict]) -> None:
    """Failures first, then a table of chapters, then one line that sums up."""
    failures = [record for record in run.records if record.outcome == "failed"]
    for record in failures:
        _failure(console, record)
    console.print(_table(run, verdicts))
    counts = Counter(record.outcome for record in run.records)
    broken = sum(v.status == FAILED for v in verdicts)
    warned = sum(v.status == WARNED for v in verdicts)
    console.print(
        f"{counts['passed']} tests passed, [bold]{counts['failed']} failed[/], {counts['n/a']} not"
        f" applicable, in {run.seconds:.0f} s;"
        f" [{'red' if broken else 'green'}]{broken} requirements broken[/],"
        f" {warned} recommendations not followed"
    )


def _failure(console: Console, record: Record) -> None:
    console.rule(f"[red]{escape(record.name)}", align="left")
    console.print(f"[bold]tested:[/]   {escape(record.about)}")
    console.print(f"[bold]observed:[/] {escape(record.observed)}")
    for name in record.requirements:
        row = by_id()[name]
        console.print(f"[bold]rule:[/]     {row.id} ({row.strength}) {escape(row.text)}")
        console.print(f"          [dim]{escape(row.label)}[/]")
    lines = shortened(record.wire.splitlines(), 1, SHOWN_WIRE)
    if lines:
        console.print("[bold]sent and received:[/]")
        for line in lines:
            console.print(f"  [dim]{escape(line)}[/]", no_wrap=True, crop=True)
    if record.backend.strip():
        console.print("[bold]backend's output:[/]")
        for line in record.backend.strip().splitlines()[-4:]:
            console.print(f"  [dim]{escape(line)}[/]")
    console.print("[bold]again:[/]", escape(record.repeat), soft_wrap=True)


def _table(run: Run, verdicts: list[Verdict]) -> Table:
    title = f"{run.protocol}, device {run.device}: requirements"
    table = Table(title=title, title_justify="left")
    table.add_column("chapter")
    columns = (PASSED, FAILED, WARNED, NOT_APPLICABLE, UNTESTABLE)
    for column in columns:
        table.add_column(column, justify="right")
    per_chapter: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        per_chapter.setdefault(verdict.chapter.title, Counter())[verdict.status] += 1
    for title, counts in per_chapter.items():
        cells = [str(counts[column] or "") for column in columns]
        cells[1] = f"[bold red]{cells[1]}[/]" if cells[1] else ""
        cells[2] = f"[yellow]{cells[2]}[/]" if cells[2] else ""
        table.add_row(title, *cells)
    return table
