# SPDX-License-Identifier: Apache-2.0
"""``vballoon map``: show guest memory as a picture, in the terminal or as a PNG file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vballoon.cli.common import Subparsers, add_command

if TYPE_CHECKING:
    from vballoon.cli.picture import MemoryPicture

__all__ = ("add", "run")

EXAMPLES = """\
  vballoon map control.sock                  show it in the terminal
  vballoon map control.sock --png memory.png write it to a file
  vballoon map skip-bitmap/                  of an exported bitmap
"""
TERMINAL_LINES = 24
"""Maximum number of lines of the picture in a terminal."""


def add(commands: Subparsers) -> None:
    """Declare the subcommand."""
    command = add_command(
        commands,
        "map",
        run,
        summary="show the guest's memory as a picture",
        description=(
            "Show which memory the host holds (resident), which the guest gave back (ballooned,\n"
            "reported), and which it only reported free (hinted, walked)."
        ),
        examples=EXAMPLES,
    )
    command.add_argument(
        "source", metavar="SOCKET", help="a control socket, or the directory of an export"
    )
    command.add_argument("--png", metavar="FILE", help="write a PNG file instead")


def run(options: argparse.Namespace) -> int:
    """Fetch the map and draw it."""
    source = Path(options.source)
    if options.png is None:
        from rich.console import Console

        from vballoon.cli.terminal import columns_for, show

        console = Console()
        rows = TERMINAL_LINES * (1 if console.color_system is None else 2)
        picture = _picture(source, columns_for(console.width) * rows)
        show(picture, console)
        return 0
    from vballoon.cli.png import CELLS, save

    picture = _picture(source, CELLS)
    save(picture, options.png, f"vballoon: {source}")
    return 0


def _picture(source: Path, cells: int) -> MemoryPicture:
    from vballoon.cli.picture import MemoryPicture

    if source.is_dir():
        from vballoon.skipmap import SkipExport

        return MemoryPicture.from_export(SkipExport(source), cells)
    from vballoon.control.client import ControlClient

    with ControlClient(source) as client:
        return MemoryPicture.from_reply(client.execute("query-memory-map", {"cells": cells}))
