# SPDX-License-Identifier: Apache-2.0
"""Show the progress of a snapshot on standard error."""

from __future__ import annotations

import sys
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from vballoon.snapshot.run import Observer

__all__ = ("Quiet", "Watching")


class Quiet(Observer):
    """Print messages, and no progress."""

    def say(self, text: str) -> None:
        """Print a line."""
        print(f"vballoon: {text}", file=sys.stderr)


class Watching(Quiet):
    """Print messages, and show a bar of the bytes copied."""

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
        """Set the length of the bar to *total* bytes."""
        self._progress.update(self._task, total=total)

    def copied(self, done: int) -> None:
        """Advance the bar by *done* bytes."""
        self._progress.advance(self._task, done)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
