# SPDX-License-Identifier: Apache-2.0
"""docs/control.md lists the commands that there are."""

from __future__ import annotations

import sys
from pathlib import Path

from vballoon.control.commands_snapshot import COMMANDS

PAGE = Path(__file__).parents[2] / "docs" / "control.md"
MARK = "compares -->\n"


def table() -> str:
    """Return the commands as Markdown."""
    lines = ["| command | arguments | |", "| --- | --- | --- |"]
    for command in COMMANDS.commands.values():
        arguments = "; ".join(
            f"`{name}` ({'optional, ' if argument.optional else ''}{argument.help})"
            for name, argument in command.arguments.items()
        )
        lines.append(f"| `{command.name}` | {arguments} | {command.help} |")
    return "\n".join(lines) + "\n"


def parts() -> tuple[str, str, str]:
    """Return the text before the list of commands, the list, and the text after it."""
    before, rest = PAGE.read_text().split(MARK)
    listed, after = rest.split("<!-- end -->")
    return before, listed, after


def test_the_page_is_current():
    """``python -m tests.unit.test_control_docs write`` makes it so."""
    assert parts()[1] == table()


def test_the_events_are_those_that_are_sent():
    text = PAGE.read_text()
    source = "".join(p.read_text() for p in (PAGE.parents[1] / "device" / "vballoon").rglob("*.py"))
    for name in (
        "BALLOON_CHANGE",
        "ROUND_COMPLETED",
        "FRONTEND_CONNECTED",
        "FRONTEND_DISCONNECTED",
        "QUEUE_BROKEN",
    ):
        assert f"| `{name}` |" in text
        assert f'"{name}"' in source


if __name__ == "__main__" and sys.argv[1:] == ["write"]:
    head, _, tail = parts()
    PAGE.write_text(f"{head}{MARK}{table()}<!-- end -->{tail}")
