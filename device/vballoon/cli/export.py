# SPDX-License-Identifier: Apache-2.0
"""``vballoon export``: write the skip bitmap to files."""

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
      write manifest.json and raw bitmaps in the layout of KVM_GET_DIRTY_LOG
  vballoon export control.sock skip/ --format ranges
      also write ranges.csv: provenance, first page, pages
  vballoon export control.sock skip/ --format png
      also write map.png

Read the safety rule in spec/vballoon_spec/skipmap/README.md before you skip a page: hinted and
walked bits are valid only together with writes tracked since before the round was published.
"""


def add(commands: Subparsers) -> None:
    """Declare the subcommand."""
    command = add_command(
        commands,
        "export",
        run,
        summary="write the skip bitmap to a directory",
        description=("Write the current skip bitmap to a new DIRECTORY, complete or not at all."),
        examples=EXAMPLES,
    )
    command.add_argument("socket", metavar="SOCKET", help="path of the control socket")
    command.add_argument(
        "directory", metavar="DIRECTORY", help="directory to create; must not exist yet"
    )
    command.add_argument(
        "--format",
        action="append",
        choices=("raw", "ranges", "png"),
        help="files to write in addition to the raw bitmaps; may be repeated",
    )


def run(options: argparse.Namespace) -> int:
    """Fetch the export and write it, then add the other formats."""
    from vballoon.control.client import ControlClient
    from vballoon.memory import PAGE_SIZE

    directory = Path(os.path.abspath(options.directory))
    with ControlClient(options.socket, timeout=600) as client:
        written_pages = client.export(directory)
    for name, pages in written_pages.items():
        print(f"{name:<10} {pages:>12,} pages  {size_text(pages * PAGE_SIZE):>10}")
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
    """Write all runs of set bits as comma-separated values, after a header line."""
    try:
        with path.open("w") as file:
            file.write("provenance,first_pfn,pages\n")
            for provenance in export.provenances:
                runs = export.raw_bitmap(provenance).extents()
                file.writelines(f"{provenance},{a},{b - a}\n" for a, b in runs.tolist())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
