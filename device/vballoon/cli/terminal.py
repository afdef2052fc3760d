# SPDX-License-Identifier: Apache-2.0
"""The memory picture in a terminal: half blocks in colour, or letters without colour."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.style import Style
from rich.text import Text

from vballoon.cli.common import size_text
from vballoon.cli.picture import BACKGROUND, CATEGORIES, COLOURS, MEANING
from vballoon.memory import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from vballoon.cli.picture import Colour, MemoryPicture, PictureRegion

__all__ = ("columns_for", "show")

LETTERS = {"resident": "#", "reported": "r", "ballooned": "b", "hinted": "h", "walked": "w"}
LABEL = 15
"""Width of an address in columns."""


def columns_for(width: int) -> int:
    """Return the number of cells in a row of *width* columns, a power of two if it fits."""
    room = max(8, width - LABEL - 1)
    return 1 << (room.bit_length() - 1)


def show(picture: MemoryPicture, console: Console) -> None:
    """Print *picture* and its legend to *console*."""
    columns = columns_for(console.width)
    colour = console.color_system is not None
    per_line = columns * (2 if colour else 1)
    console.print(
        f"{size_text(picture.size)} of guest memory, a cell is {size_text(picture.cell_bytes)}, "
        f"a line {size_text(per_line * picture.cell_bytes)}",
        highlight=False,
    )
    for region in picture.regions:
        for line in _lines(region, picture.cell_bytes, columns, colour=colour):
            console.print(line, no_wrap=True, overflow="crop", highlight=False, soft_wrap=True)
    for line in _legend(picture, colour=colour):
        console.print(line, highlight=False)


def _lines(region: PictureRegion, cell_bytes: int, columns: int, *, colour: bool) -> Iterator[Text]:
    step = columns * (2 if colour else 1)
    for first in range(0, region.cells(), step):
        digits = f"{region.guest_phys_addr + first * cell_bytes:012x}"
        line = Text(f"{digits[:4]} {digits[4:8]} {digits[8:]} ", Style(dim=True))
        if colour:
            _half_blocks(line, region, first, columns)
        else:
            last = min(first + columns, region.cells())
            line.append(
                "".join(LETTERS.get(region.dominant(i) or "", ".") for i in range(first, last))
            )
        yield line


def _half_blocks(line: Text, region: PictureRegion, first: int, columns: int) -> None:
    """Return two rows of cells as one line of text, the upper colour over the lower one."""
    cells = region.cells()
    for at in range(first, min(first + columns, cells)):
        upper = _rich(region.colour(at))
        if at + columns < cells:
            line.append("▀", Style(color=upper, bgcolor=_rich(region.colour(at + columns))))
        else:
            line.append("▀", Style(color=upper))


def _rich(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _legend(picture: MemoryPicture, *, colour: bool) -> Iterator[Text]:
    for name in CATEGORIES:
        if name in picture.pages:
            line = Text("  ")
            line.append("██" if colour else LETTERS[name], Style(color=_rich(COLOURS[name])))
            share = size_text(picture.pages[name] * PAGE_SIZE)
            line.append(f" {name:<10} {share:>10}   {MEANING[name]}")
            yield line
    if "resident" in picture.pages:
        line = Text("  ")
        line.append("██" if colour else ".", Style(color=_rich(BACKGROUND)))
        line.append(f" {MEANING['untouched']}")
        yield line
