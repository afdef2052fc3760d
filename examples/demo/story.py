# SPDX-License-Identifier: Apache-2.0
"""The steps of the demo, and the table of measurements.

The steps run on any :class:`Guest`: a Linux in QEMU, or the embedded driver.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

MIB = 1 << 20


class Guest(Protocol):
    """The operations that the steps need of a guest."""

    memory: int
    """Size in bytes."""
    freed: int
    """Bytes that :meth:`dirty` writes."""

    def dirty(self) -> None:
        """Fill memory with random bytes and keep it."""

    def free(self) -> None:
        """Give that memory back to the guest's allocator."""

    def free_bytes(self) -> int:
        """Return the free memory in bytes, as the guest reports it."""

    def resident(self) -> int:
        """Return the bytes that the RAM file occupies on the host."""

    def intact(self) -> bool:
        """Return whether the data that the guest kept since the start is unchanged."""

    def idle(self) -> None:
        """Let the guest run for a moment."""


@dataclass(frozen=True)
class Row:
    """One row of the table of measurements."""

    what: str
    measured: str
    expected: str
    good: bool


class Story:
    """Run the steps, print them to a console, and collect the rows."""

    def __init__(self, guest: Guest, ctl: Callable[..., Any], console: Console) -> None:
        self.guest, self.ctl, self.console = guest, ctl, console
        self.rows: list[Row] = []

    def tell(self, socket: Path, folder: Path) -> bool:
        """Run all steps and return whether all results are as expected."""
        for title, step in (
            ("memory is dirtied and freed in the guest", self.reclaim),
            ("the balloon is inflated to half the guest, and deflated", self.balloon),
            ("one free page hinting round", self.hint),
            ("memory statistics", self.statistics),
        ):
            with self.console.status(f"[bold]{title}[/]…"):
                step()
            self.console.print(f"[green]•[/] {title}: {self.rows[-1].measured}")
        self.export(socket, folder)
        self.picture(socket, folder / "memory-map.png")
        self.row(
            "data kept by the guest",
            "intact" if self.guest.intact() else "DAMAGED",
            "intact",
            self.guest.intact(),
        )
        self.console.print(self.table())
        self.console.print(f"exported bitmap and picture: {folder}")
        return all(row.good for row in self.rows)

    def reclaim(self) -> None:
        """Check that reporting gives back the memory that the guest frees."""
        start = self.guest.resident()
        self.guest.dirty()
        full = self.guest.resident()
        self.row(
            "RAM file, memory in use",
            mib(full),
            f"≥ {mib(self.guest.freed)} more",
            full - start >= 0.9 * self.guest.freed,
        )
        self.guest.free()
        goal = full - 0.95 * self.guest.freed
        self.wait(lambda: self.guest.resident() <= goal)
        back = full - self.guest.resident()
        self.row(
            "RAM file, memory freed",
            mib(self.guest.resident()),
            f"≤ {mib(goal)}",
            self.guest.resident() <= goal,
        )
        self.row(
            "given back to the host",
            f"{100 * back / self.guest.freed:.1f} %",
            "≥ 95 %",
            back >= 0.95 * self.guest.freed,
        )

    def wait_for_balloon(self, target: int, tolerance: int) -> None:
        """Wait until the guest has *target* bytes, give or take *tolerance*."""
        self.wait(lambda: abs(self.ctl("query-balloon")["actual"] - target) <= tolerance)

    def balloon(self) -> None:
        """Inflate to half of the guest, and deflate."""
        size = self.ctl("query-balloon")["actual"]
        for name, target in (("inflated", size // 2), ("deflated", size)):
            self.ctl("balloon", value=target)
            self.wait_for_balloon(target, size // 100)
            actual = self.ctl("query-balloon")["actual"]
            self.row(
                f"{name}: guest has",
                mib(actual),
                f"{mib(target)} ± 1 %",
                abs(actual - target) <= size // 100,
            )

    def hint(self) -> None:
        """Check that a hinting round covers the guest's free memory."""
        free = self.guest.free_bytes()
        round_id = self.ctl("start-hinting")["round"]
        self.wait(lambda: self.ctl("query-round")["state"] != "running")
        done = self.ctl("query-round")
        hinted = self.ctl("query-skip-bitmap")["pages"]["hinted"] * 4096
        self.row(
            f"round {round_id}: free memory hinted",
            f"{100 * hinted / free:.1f} %",
            "≥ 90 %",
            done["complete"] and hinted >= 0.9 * free,
        )

    def statistics(self) -> None:
        """Request statistics from the guest."""
        self.ctl("set-guest-stats-interval", seconds=1)
        self.wait(lambda: self.ctl("query-guest-stats")["last-update"] > 0)
        stats = self.ctl("query-guest-stats")["stats"]
        self.row(
            "statistics",
            f"{len(stats)} figures, {mib(stats['stat-free-memory'])} free",
            "at least 10",
            len(stats) >= 10,
        )

    def export(self, socket: Path, folder: Path) -> None:
        """Export the bitmap."""
        from vballoon.control import ControlClient

        target = folder / "skip-bitmap"
        with ControlClient(socket, timeout=60) as client:
            client.export(target)
        pages = json.loads((target / "manifest.json").read_text())["pages"]
        live = self.ctl("query-skip-bitmap")["pages"]
        said = ", ".join(f"{count} {name}" for name, count in pages.items())
        self.row("exported pages", said, "as live", pages == live)

    def picture(self, socket: Path, png: Path) -> None:
        """Show the map of guest memory in the terminal and write it to a file."""
        from vballoon.cli import main

        main(["map", str(socket), "--png", str(png)])
        main(["map", str(socket)])
        self.row("memory map", png.name, "a picture", png.stat().st_size > 1000)

    def wait(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until *condition* holds or the time is up; the row then reports the failure."""
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            self.guest.idle()

    def row(self, what: str, measured: str, expected: str, good: bool) -> None:
        """Add a row with a result."""
        self.rows.append(Row(what, measured, expected, bool(good)))

    def table(self) -> Table:
        """Return the table of measurements."""
        table = Table(title="vballoon demo", title_justify="left")
        for heading in ("", "measured", "expected", ""):
            table.add_column(heading)
        for row in self.rows:
            verdict = "[green]ok[/]" if row.good else "[bold red]FAILED[/]"
            table.add_row(row.what, row.measured, row.expected, verdict)
        return table


def mib(count: float) -> str:
    """Return *count* bytes as text in MiB."""
    return f"{count / MIB:.0f} MiB"
