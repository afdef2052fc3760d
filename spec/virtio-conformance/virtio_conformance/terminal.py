# SPDX-License-Identifier: Apache-2.0
"""The report in a terminal."""

from __future__ import annotations

from collections import Counter

from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from virtio_conformance.baseline import Difference
from virtio_conformance.record import FAILED as TEST_FAILED
from virtio_conformance.record import INCONCLUSIVE, NOT_APPLICABLE, PASSED, Record, Run
from virtio_conformance.requirements import by_id
from virtio_conformance.transcript import shortened
from virtio_conformance.verdict import (
    ADVISED,
    FAILED,
    FRAGILE,
    STATUSES,
    UNDECIDED,
    WARNED,
    Verdict,
)

__all__ = ("Progress", "show", "show_difference")

SHOWN_WIRE = 12
"""Last lines of the exchange that are shown with a failure; the JSON file has more."""
COLOURS = {FAILED: "red", WARNED: "yellow", FRAGILE: "magenta", ADVISED: "cyan", UNDECIDED: "blue"}


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
        self._task = self._bar.add_task("starting", total=None)
        self._failed = 0

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def step(self, record: Record, total: int) -> None:
        """Count one finished test of *total*."""
        self._failed += record.outcome == TEST_FAILED
        failed = f"[red]{self._failed} failed[/] " if self._failed else ""
        name = escape(record.name.partition("::")[2][:50])
        self._bar.update(self._task, total=total, advance=1, description=failed + name)


def show(console: Console, run: Run, verdicts: list[Verdict]) -> None:
    """Print the failures, a table of chapters, counts, and the broken rows by name."""
    for record in run.records:
        if record.outcome in (TEST_FAILED, INCONCLUSIVE):
            _failure(console, record)
    console.print(_table(run, verdicts))
    for note in run.notes:
        console.print(f"note: {escape(note)}")
    counts = Counter(record.outcome for record in run.records)
    console.print(
        f"{counts[PASSED]} tests passed, [bold]{counts[TEST_FAILED]} failed[/],"
        f" {counts[INCONCLUSIVE]} inconclusive, {counts[NOT_APPLICABLE]} not applicable,"
        f" in {run.seconds:.0f} s"
    )
    _broken_rows(console, verdicts)


def _broken_rows(console: Console, verdicts: list[Verdict]) -> None:
    """Name what is broken, the worst last, where it stays in sight."""
    for status in (UNDECIDED, ADVISED, FRAGILE, WARNED, FAILED):
        rows = [verdict for verdict in verdicts if verdict.status == status]
        if not rows:
            continue
        console.print(f"[bold {COLOURS[status]}]{status}[/] ({STATUSES[status]}): {len(rows)}")
        for verdict in rows if status != UNDECIDED else ():
            row = verdict.row
            console.print(f"  [{COLOURS[status]}]{row.id}[/]  {escape(row.text)}")
    if not any(verdict.broken for verdict in verdicts):
        console.print("[bold green]no requirement is broken")


def show_difference(console: Console, difference: Difference) -> None:
    """Print what separates the run from its baseline."""
    for row, test in sorted(difference.gone):
        console.print(f"[green]gone[/]  {row}  {escape(test)}", soft_wrap=True)
    for row, test in sorted(difference.new):
        console.print(f"[bold red]new[/]   {row}  {escape(test)}", soft_wrap=True)
    console.print(
        f"baseline: {len(difference.known)} failures as known, {len(difference.new)} new,"
        f" {len(difference.gone)} gone"
    )


def _failure(console: Console, record: Record) -> None:
    row = by_id().get(record.broken)
    colour = "red" if row else "blue"
    console.rule(f"[{colour}]{escape(record.name)}", align="left")
    console.print(f"[bold]tested:[/]   {escape(record.about)}")
    if row:
        console.print(f"[bold]expected:[/] {escape(row.text)} ({row.id}, {row.strength})")
        console.print(f"          [dim]{escape(row.label)}; {escape(row.source)}[/]")
    else:
        console.print("[bold]expected:[/] nothing yet: the test ended before its check")
    console.print(f"[bold]found:[/]    {escape(record.observed)}")
    for line in record.rings.splitlines():
        console.print(f"  [dim]{escape(line)}[/]", no_wrap=True, crop=True)
    lines = shortened(record.wire.splitlines(), 1, SHOWN_WIRE)
    if lines:
        console.print("[bold]sent and received:[/]")
        for line in lines:
            console.print(f"  [dim]{escape(line)}[/]", no_wrap=True, crop=True)
    if record.backend.strip():
        console.print("[bold]output of the back-end:[/]")
        for line in record.backend.strip().splitlines()[-4:]:
            console.print(f"  [dim]{escape(line)}[/]")
    console.print("[bold]again:[/]", escape(record.repeat), soft_wrap=True)


def _table(run: Run, verdicts: list[Verdict]) -> Table:
    title = f"{run.protocol}, device {run.device}: requirements"
    table = Table(title=title, title_justify="left")
    table.add_column("chapter")
    for status in STATUSES:
        table.add_column(status, justify="right", style=COLOURS.get(status, ""))
    per_chapter: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        per_chapter.setdefault(verdict.chapter.title, Counter())[verdict.status] += 1
    for title, counts in per_chapter.items():
        table.add_row(title, *(str(counts[status] or "") for status in STATUSES))
    return table
