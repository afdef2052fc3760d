# SPDX-License-Identifier: Apache-2.0
"""``docs/benchmarks.md`` out of ``docs/benchmarks.json``; nothing in it is written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ("goal_lines", "write")

INTRODUCTION = """\
# Benchmarks

Written by `make bench` from `docs/benchmarks.json`, which keeps every sample. Figures that are
compared were taken in turns within one run (A B A B, the order reversed every second time) and are
medians; a ratio is the median of the ratios of the turns. Absolute times depend on the machine and
its load, and are context only.

The compiled inner loops are in use where they were built (`VBALLOON_NATIVE=0` turns them off);
*numpy* is the same without them.

`make bench` takes some minutes and boots virtual machines; `make bench FULL=1` measures every size,
and more often. `python -m tests.bench --only rings --quick` gives a first look at one part.
"""


def write(whole: dict[str, Any], path: Path, findings: Path, plots: dict[str, list[str]]) -> None:
    """Write the page; *plots* are image files for each part."""
    lines = [INTRODUCTION]
    host = ", ".join(f"{key} {value}" for key, value in whole["host"].items())
    lines.append(f"Machine: {host}.\n")
    lines += _summary(whole["parts"])
    if findings.exists():
        lines.append(findings.read_text())
    for part in whole["parts"].values():
        lines += _part(part, plots.get(part["name"], []))
    path.write_text("\n".join(lines).rstrip() + "\n")


def _summary(parts: dict[str, Any]) -> list[str]:
    goals = [goal for part in parts.values() for goal in part["goals"]]
    met = sum(goal["met"] for goal in goals)
    lines = [
        "## Goals\n",
        f"{met} of {len(goals)} met.\n",
        "| | goal | found | limit |",
        "| --- | --- | --- | --- |",
    ]
    for goal in goals:
        lines.append("| " + " | ".join(_goal_cells(goal)) + " |")
    return [*lines, ""]


def _goal_cells(goal: dict[str, Any]) -> list[str]:
    unit = goal["unit"]
    sign = "≤" if goal["at_most"] else "≥"
    mark = "met" if goal["met"] else "**not met**"
    return [
        mark,
        goal["text"],
        f"{number(goal['value'])} {unit}",
        f"{sign} {number(goal['limit'])} {unit}",
    ]


def goal_lines(part: dict[str, Any]) -> list[str]:
    """Return the goals of a part as text for the terminal."""
    return [
        f"  {'met    ' if goal['met'] else 'NOT MET'}  {goal['text']}:"
        f" {number(goal['value'])} {goal['unit']}"
        f" ({'at most' if goal['at_most'] else 'at least'} {number(goal['limit'])})"
        for goal in part["goals"]
    ]


def _part(part: dict[str, Any], plots: list[str]) -> list[str]:
    run = part["run"]
    lines = [f"## {part['title']}\n"]
    lines.append(
        f"Run of {run['date']}, commit {run['commit']}, {run['form']} form, "
        f"load average {run['load']}.\n"
    )
    lines += [f"* {note}" for note in part["notes"]]
    lines += [""] if part["notes"] else []
    lines += [f"![{Path(plot).stem}]({plot})\n" for plot in plots]
    for table in part["tables"]:
        lines += _table(table)
    return lines


def _table(table: dict[str, Any]) -> list[str]:
    lines = [f"### {table['title']}\n"]
    lines.append("| " + " | ".join(table["columns"]) + " |")
    lines.append("|" + " --- |" * len(table["columns"]))
    for row in table["rows"]:
        lines.append("| " + " | ".join(_cell(cell) for cell in row) + " |")
    return [*lines, "", *([table["note"], ""] if table["note"] else [])]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return number(value) if isinstance(value, int | float) else str(value)


def number(value: float) -> str:
    """Three figures that matter, no more; integers as they are."""
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return f"{int(value)}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"
