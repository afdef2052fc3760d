# SPDX-License-Identifier: Apache-2.0
"""``vballoon export``: the skip bitmap as files."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vballoon.cli.common import Subparsers, add_command, size_text
from vballoon.errors import UsageError

if TYPE_CHECKING:
    from vballoon.skipmap import SkipExport

__all__ = ("add", "run")

EXAMPLES = """\
  vballoon export control.sock skip/
      manifest.json, and raw bitmaps in the layout of KVM_GET_DIRTY_LOG
  vballoon export control.sock skip/ --format ranges
      besides, ranges.csv: provenance, first page, pages
  vballoon export control.sock skip/ --format png
      besides, map.png

Read the safety rule in the format's description before you skip a page: hinted and walked
bits hold only together with writes tracked since before the round was published.
"""


def add(commands: Subparsers) -> None:
    """Declare the subcommand."""
    command = add_command(
        commands,
        "export",
        run,
        summary="write the skip bitmap to a directory",
        description=(
            "Write the skip bitmap as it is now to a new DIRECTORY, whole or not at all. The\n"
            "server writes it, so it must be able to."
        ),
        examples=EXAMPLES,
    )
    command.add_argument("socket", metavar="SOCKET", help="path of the control socket")
    command.add_argument("directory", metavar="DIRECTORY", help="must not be there yet")
    command.add_argument(
        "--format",
        action="append",
        choices=("raw", "ranges", "png"),
        help="what to add to the raw bitmaps, which are always written; may be repeated",
    )


def run(options: argparse.Namespace) -> int:
    """Have it written, and add what else was asked for."""
    from vballoon.control.client import ControlClient

    directory = Path(os.path.abspath(options.directory))
    with ControlClient(options.socket, timeout=600) as client:
        answer = client.execute("export-skip-bitmap", {"directory": str(directory)})
    for name, pages in answer["pages"].items():
        print(f"{name:<10} {pages:>12,} pages  {size_text(pages * 4096):>10}")
    formats = set(options.format or ()) - {"raw"}
    if formats:
        from vballoon.skipmap import SkipExport

        written = SkipExport(directory)
        if "ranges" in formats:
            write_ranges(written, directory / "ranges.csv")
        if "png" in formats:
            from vballoon.cli.picture import MemoryPicture
            from vballoon.cli.png import CELLS, save

            picture = MemoryPicture.from_export(written, CELLS)
            save(picture, directory / "map.png", f"vballoon: {directory.name}")
    return 0


def write_ranges(export: SkipExport, path: Path) -> None:
    """All runs of set bits as comma-separated values, a header line first."""
    try:
        with path.open("w") as file:
            file.write("provenance,first_pfn,pages\n")
            for provenance in export.provenances:
                runs = export.raw_bitmap(provenance).extents()
                file.writelines(f"{provenance},{a},{b - a}\n" for a, b in runs.tolist())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
