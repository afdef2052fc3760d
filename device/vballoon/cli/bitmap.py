# SPDX-License-Identifier: Apache-2.0
"""``vballoon bitmap``: show, compare, combine and verify exported bitmaps."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vballoon.cli.common import Subparsers, add_command, size_text
from vballoon.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vballoon.skipmap import SkipExport

__all__ = ("add", "run")

EXAMPLES = """\
  vballoon bitmap verify skip/
      check checksums, sizes, counts and rounds
  vballoon bitmap show skip/
  vballoon bitmap diff before/ after/
  vballoon bitmap and skip/hinted-0.bitmap --not dirty-0.bitmap --output skip-0.bitmap
      the safety rule: pages hinted and not written since; dirty-0.bitmap is the dirty log
      of the same memory slot, in the format of KVM_GET_DIRTY_LOG
"""


def add(commands: Subparsers) -> None:
    """Declare the subcommand and its verbs."""
    command = add_command(
        commands,
        "bitmap",
        run,
        summary="work on exported bitmaps",
        description=(
            "Work on directories written by 'vballoon export', and on the raw bitmaps in them."
        ),
        examples=EXAMPLES,
    )
    verbs = command.add_subparsers(metavar="VERB", required=True, title="verbs")
    show = verbs.add_parser("show", help="show the contents of an export")
    show.add_argument("directory", metavar="DIRECTORY")
    show.set_defaults(verb=_show)
    diff = verbs.add_parser("diff", help="show where two exports of one guest differ")
    diff.add_argument("first", metavar="BEFORE")
    diff.add_argument("second", metavar="AFTER")
    diff.set_defaults(verb=_diff)
    both = verbs.add_parser("and", help="combine raw bitmaps of the same region")
    both.add_argument("files", metavar="FILE", nargs="+", help="keep bits set in all of these")
    both.add_argument(
        "--not",
        dest="without",
        metavar="FILE",
        action="append",
        default=[],
        help="and set in none of these; may be repeated",
    )
    both.add_argument("--output", "-o", metavar="FILE", required=True, help="the result")
    both.set_defaults(verb=_and)
    verify = verbs.add_parser("verify", help="check an export; fail unless every bit may be used")
    verify.add_argument("directory", metavar="DIRECTORY", nargs="+")
    verify.set_defaults(verb=_verify)


def run(options: argparse.Namespace) -> int:
    """Run the verb and return its exit code."""
    code: int = options.verb(options)
    return code


def _open(directory: str) -> SkipExport:
    from vballoon.skipmap import SkipExport

    return SkipExport(directory)


def _show(options: argparse.Namespace) -> int:
    from vballoon.memory import PAGE_SIZE

    export = _open(options.directory)
    for region in export.layout.regions:
        print(
            f"region {region.guest_phys_addr:#014x}  {size_text(region.size):>10}  "
            f"file offset {region.file_offset:#x}"
        )
    for provenance, pages in export.verify().items():
        objection = export.objection(provenance)
        note = f"  do not use: {objection}" if objection else ""
        runs = len(export.raw_bitmap(provenance).extents())
        share = size_text(pages * PAGE_SIZE)
        print(f"{provenance:<10} {pages:>12,} pages  {share:>10}  {runs:>9,} runs{note}")
    if export.manifest.poison:
        print(f"poison     {export.manifest.poison:#010x}: hinted and walked pages need filling")
    return 0


def _verify(options: argparse.Namespace) -> int:
    for directory in options.directory:
        export = _open(directory)
        export.verify()
        for provenance in export.provenances:
            reason = export.objection(provenance)
            if reason is not None and export.manifest.pages.get(provenance.value):
                raise UsageError(f"{directory}: {reason}")
        print(f"{directory}: good")
    return 0


def _diff(options: argparse.Namespace) -> int:
    first, second = _open(options.first), _open(options.second)
    if first.layout != second.layout:
        raise UsageError(f"{options.first} and {options.second} have different memory regions")
    differs = False
    for provenance in first.provenances:
        before, after = first.raw_bitmap(provenance), second.raw_bitmap(provenance)
        gained, lost = after.and_not(before).count(), before.and_not(after).count()
        differs |= bool(gained or lost)
        print(f"{provenance:<10} {gained:>12,} pages gained {lost:>12,} pages lost")
    return 1 if differs else 0


def _and(options: argparse.Namespace) -> int:
    from vballoon.memory import PAGE_SIZE
    from vballoon.skipmap import bits

    first, *others = (_raw(name) for name in options.files)
    result = first.copy()
    for name, words in zip(options.files[1:], others, strict=True):
        result &= _same_size(words, result, name)
    for name in options.without:
        result &= ~_same_size(_raw(name), result, name)
    try:
        result.tofile(options.output)
    except OSError as error:
        raise UsageError(f"{options.output}: {error.strerror}") from None
    pages = bits.count(result)
    print(f"{pages:,} pages, {size_text(pages * PAGE_SIZE)}")
    return 0


def _raw(name: str) -> NDArray[np.uint64]:
    from vballoon.skipmap.export import read_bitmap

    path = Path(name)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from None
    if size % 8:
        raise UsageError(f"{name}: {size} bytes are not a whole number of 64-bit words")
    return read_bitmap(path, size * 8)


def _same_size(
    words: NDArray[np.uint64], other: NDArray[np.uint64], name: str
) -> NDArray[np.uint64]:
    if words.size != other.size:
        raise UsageError(f"{name}: {words.size} words where the first bitmap has {other.size}")
    return words
