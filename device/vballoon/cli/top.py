# SPDX-License-Identifier: Apache-2.0
"""``vballoon top``: show many machines, again and again."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from vballoon.cli.common import Subparsers, add_command, size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.text import Text

    from vballoon.fleet.sample import Sample
    from vballoon.fleet.watching import Watcher

__all__ = ("View", "add", "run")

EXAMPLES = """\
  vballoon top /run/vballoon/*.sock            live; keys: arrows, enter, s, r, q
  vballoon top --once web=/run/vballoon/a.sock one table
  vballoon top --json /run/vballoon/*.sock     one JSON array, for programs
"""
COLUMNS = ("name", "state", "resident", "target", "actual", "available", "reported", "restarts")
"""What a row shows and can be sorted by."""
TITLES = {"name": "vm", "available": "avail"}
STYLES = {"unreachable": "bold red", "broken": "bold red", "no driver": "yellow", "waiting": "dim"}
HISTORY = 30
"""Samples that a small history shows."""
WIDE = 110
"""Columns from which on there is room for the history."""
BARS = "▁▂▃▄▅▆▇█"


def add(commands: Subparsers) -> None:
    """Declare the subcommand."""
    command = add_command(
        commands,
        "top",
        run,
        summary="show many machines live",
        description=(
            "Show resident memory, target, actual, available and reported memory of machines.\n"
            "Keys: s sorts by the next column, r reverses, the arrows choose a machine, enter\n"
            "shows its memory map, q ends."
        ),
        examples=EXAMPLES,
    )
    command.add_argument(
        "sockets", metavar="[NAME=]SOCKET", nargs="+", help="control sockets to ask"
    )
    command.add_argument(
        "--interval", metavar="SECONDS", type=float, default=2.0, help="between two (default: 2)"
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument("--once", action="store_true", help="print one table and end")
    form.add_argument("--json", action="store_true", help="print one JSON array and end")


def run(options: argparse.Namespace) -> int:
    """Ask and show; the exit status is 1 if a machine was unreachable with --once or --json."""
    from vballoon.fleet.watching import Watcher, machines

    watcher = Watcher(machines(options.sockets))
    if not (options.once or options.json):
        return asyncio.run(_live(watcher, max(0.2, options.interval)))
    samples = asyncio.run(_one(watcher))
    if options.json:
        rows = [dataclasses.asdict(sample) | {"state": sample.state} for sample in samples]
        print(json.dumps(rows, indent=2))
    else:
        from rich.console import Console

        console = Console()
        view = View(samples)
        console.print(view.table(console.width))
    return int(any(sample.error is not None for sample in samples))


async def _one(watcher: Watcher) -> list[Sample]:
    async with watcher:
        return await watcher.ask()


async def _live(watcher: Watcher, interval: float) -> int:
    from rich.console import Console
    from rich.live import Live as Screen

    from vballoon.cli.keys import ENTER, pressed

    console = Console()
    view = View(())
    with pressed() as key_within:
        async with watcher:
            while True:
                with Screen(console=console, screen=True, auto_refresh=False) as live:
                    key = await _refresh(watcher, view, live, key_within, interval)
                if key != ENTER:
                    return 0
                path = next(m.path for m in watcher.machines if m.name == view.chosen)
                await asyncio.to_thread(_show_map, path, console)
                while await asyncio.to_thread(key_within, 60.0) is None:
                    pass


async def _refresh(
    watcher: Watcher,
    view: View,
    live: Live,
    key_within: Callable[[float], str | None],
    interval: float,
) -> str:
    """Show what is new until the user ends or opens something; return that key."""
    from vballoon.cli.keys import ENTER

    while True:
        view.update(await watcher.ask())
        due = time.monotonic() + interval
        while (left := due - time.monotonic()) > 0:
            live.update(view.screen(live.console), refresh=True)
            key: str | None = await asyncio.to_thread(key_within, left)
            if key == "q" or (key == ENTER and view.chosen is not None):
                return key
            view.press(key)


def _show_map(path: str, console: Console) -> None:
    from vballoon.cli.picture import MemoryPicture
    from vballoon.cli.terminal import columns_for, show
    from vballoon.control.client import ControlClient
    from vballoon.errors import VballoonError

    console.clear()
    cells = columns_for(console.width) * max(4, console.height - 10)
    try:
        with ControlClient(path, 5.0) as client:
            reply = client.execute("query-memory-map", {"cells": cells})
        show(MemoryPicture.from_reply(reply), console)
    except VballoonError as error:
        console.print(f"{path}: {error}", markup=False)
    console.print("\n[dim]press a key[/]")


class View:
    """What the table shows: samples, their order, the chosen machine, a short history of each."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples: list[Sample] = []
        self._history: dict[str, deque[int | None]] = {}
        self._column, self._reverse = 0, False
        self._row = 0
        self.update(samples)

    def update(self, samples: Sequence[Sample]) -> None:
        """Take newer *samples*."""
        names = {sample.name for sample in samples}
        self._history = {name: kept for name, kept in self._history.items() if name in names}
        for sample in samples:
            kept = self._history.setdefault(sample.name, deque(maxlen=HISTORY))
            kept.append(sample.resident)
        self._samples = list(samples)

    @property
    def rows(self) -> list[Sample]:
        """The samples in the order that the user wants; what is not known comes last."""
        column = COLUMNS[self._column]
        known = [s for s in self._samples if getattr(s, column) is not None]
        unknown = [s for s in self._samples if getattr(s, column) is None]
        known.sort(key=lambda s: (getattr(s, column), s.name), reverse=self._reverse)
        return known + unknown

    @property
    def chosen(self) -> str | None:
        """The name of the machine under the cursor."""
        rows = self.rows
        return rows[min(self._row, len(rows) - 1)].name if rows else None

    def press(self, key: str | None) -> None:
        """Handle a key that only changes what is shown."""
        if key == "s":
            self._column = (self._column + 1) % len(COLUMNS)
        elif key == "r":
            self._reverse = not self._reverse
        elif key == "up":
            self._row = max(0, self._row - 1)
        elif key == "down":
            self._row = min(max(0, len(self._samples) - 1), self._row + 1)

    def screen(self, console: Console) -> RenderableType:
        """Return the table for the whole screen."""
        return self.table(console.width, room=max(1, console.height - 5), cursor=True)

    def table(self, width: int, *, room: int | None = None, cursor: bool = False) -> RenderableType:
        """Return the table, *width* columns wide, of the *room* rows around the cursor."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        rows = self.rows
        held = sum(sample.resident or 0 for sample in rows)
        title = f"{len(rows)} machines, {size_text(held)} resident"
        table = Table(
            title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left"
        )
        wide = width >= WIDE
        for index, name in enumerate(COLUMNS):
            mark = ("▲" if self._reverse else "▼") if index == self._column else ""
            table.add_column(
                TITLES.get(name, name) + mark,
                no_wrap=True,
                overflow="ellipsis",
                justify="left" if index < 2 else "right",
                max_width=24 if wide else 12,
            )
        if wide:
            table.add_column("resident so far", no_wrap=True)
        row = min(self._row, len(rows) - 1)
        table.caption, table.caption_justify = (
            self._explanation(rows, row if cursor else None),
            "left",
        )
        first = 0 if room is None else max(0, min(row - room // 2, len(rows) - room))
        for index, sample in enumerate(rows[first:][:room], first):
            cells = [*_cells(sample), *([bars(self._history[sample.name])] if wide else [])]
            style = "reverse" if cursor and index == row else STYLES.get(sample.state, "")
            table.add_row(*cells, style=style)
        return table

    def _explanation(self, rows: list[Sample], row: int | None) -> Text:
        """Say why machines cannot be asked or are broken: all of them, or the one at *row*."""
        from rich.text import Text as Lines

        lines = []
        for sample in rows if row is None else rows[row : row + 1]:
            if sample.error is not None:
                lines.append(f"{sample.name}: {sample.error}")
            lines += [f"{sample.name}: queue {index} broke {rule}" for index, rule in sample.broken]
        return Lines("\n".join(lines))


def _cells(sample: Sample) -> list[Any]:
    from rich.text import Text

    sizes = ("resident", "target", "actual", "available", "reported")
    shown = [_size(getattr(sample, name)) for name in sizes]
    return [Text(sample.name), sample.state, *shown, str(sample.restarts)]


def _size(value: int | None) -> str:
    """Return *value* bytes in at most six characters: ``1.5G``, ``1023M``."""
    if value is None:
        return "-"
    number, _, unit = size_text(value).partition(" ")
    short = number if len(number) < 6 else f"{float(number):.0f}"
    return short + unit.removesuffix("iB")


def bars(values: Sequence[int | None] | deque[int | None]) -> str:
    """Return *values* as a line of block characters, from 0 to the largest."""
    top = max((value for value in values if value is not None), default=0) or 1
    return "".join(
        " " if value is None else BARS[min(len(BARS) - 1, value * len(BARS) // (top + 1))]
        for value in values
    )
