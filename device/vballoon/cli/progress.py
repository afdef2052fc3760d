# SPDX-License-Identifier: Apache-2.0
"""How a snapshot goes, on standard error."""

from __future__ import annotations

import sys
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from vballoon.snapshot.take import Observer

__all__ = ("Quiet", "Watching")


class Quiet(Observer):
    """Says only what must be said."""

    def say(self, text: str) -> None:
        """Print a line."""
        print(f"vballoon: {text}", file=sys.stderr)


class Watching(Quiet):
    """A bar of what is copied."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("look", total=None)

    def step(self, name: str) -> None:
        """Show the step's name."""
        self._progress.update(self._task, description=name)

    def size(self, total: int) -> None:
        """Now the bar has a length."""
        self._progress.update(self._task, total=total)

    def copied(self, done: int) -> None:
        """Move the bar on."""
        self._progress.advance(self._task, done)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
