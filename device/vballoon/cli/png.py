# SPDX-License-Identifier: Apache-2.0
"""The memory picture as a PNG file, with addresses at the side and a legend below."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from vballoon.cli.common import size_text
from vballoon.cli.picture import BACKGROUND, CATEGORIES, COLOURS, MEANING
from vballoon.errors import UsageError
from vballoon.memory import PAGE_SIZE

if TYPE_CHECKING:
    import os

    from vballoon.cli.picture import Colour, MemoryPicture, PictureRegion

__all__ = ("CELLS", "save")

CELLS = 1 << 16
"""Maximum number of cells of a picture: 256 rows of 256."""
COLUMNS = 256
SCALE = 3
"""Width and height of a cell in pixels."""
MARGIN = 16
GAP = 14
"""Pixels between two regions."""
TEXT, FRAME, PAPER = (32, 32, 32), (160, 160, 160), (255, 255, 255)
TICK = 40
"""Minimum number of pixels between two address labels."""


def save(picture: MemoryPicture, path: str | os.PathLike[str], title: str) -> None:
    """Write *picture* to *path*.  Raise UsageError if it cannot be written."""
    try:
        draw_picture(picture, title).save(path, format="PNG", optimize=True)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None


def draw_picture(picture: MemoryPicture, title: str) -> Image.Image:
    """Return the whole image."""
    small, large = ImageFont.load_default(13), ImageFont.load_default(17)
    left = MARGIN + int(small.getlength("0x0000 0000 0000")) + 10
    blocks = [_region_image(r) for r in picture.regions]
    entries = legend(picture)
    header = MARGIN + 54
    height = header + sum(b.height + GAP for b in blocks) + 22 * ((len(entries) + 1) // 2) + MARGIN
    width = left + COLUMNS * SCALE + MARGIN
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN - 2), title, TEXT, large)
    caption = (
        f"{size_text(picture.size)} of guest memory, a cell is {size_text(picture.cell_bytes)}, "
        f"a row {size_text(picture.cell_bytes * COLUMNS)}; guest-physical addresses"
    )
    draw.text((MARGIN, MARGIN + 24), caption, TEXT, small)
    top = header
    for region, block in zip(picture.regions, blocks, strict=True):
        image.paste(block, (left, top))
        draw.rectangle((left - 1, top - 1, left + block.width, top + block.height), outline=FRAME)
        _addresses(draw, region, picture.cell_bytes, left, top, block.height, small)
        top += block.height + GAP
    _legend(draw, entries, left, top, small)
    return image


def _region_image(region: PictureRegion) -> Image.Image:
    cells = region.cells()
    rows = max(1, -(-cells // COLUMNS))
    image = Image.new("RGB", (COLUMNS, rows), PAPER)
    image.putdata([region.colour(i) for i in range(cells)])
    return image.resize((COLUMNS * SCALE, rows * SCALE), Image.Resampling.NEAREST)


def _addresses(
    draw: ImageDraw.ImageDraw,
    region: PictureRegion,
    cell_bytes: int,
    left: int,
    top: int,
    height: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Label rows from the start of the region, with space between the labels."""
    rows = 1
    while rows * SCALE < TICK:
        rows *= 2
    for row in range(0, max(1, height // SCALE - 4), rows):
        address = region.guest_phys_addr + row * COLUMNS * cell_bytes
        digits = f"{address:012x}"
        label = f"0x{digits[:4]} {digits[4:8]} {digits[8:]}"
        y = top + row * SCALE
        draw.line((left - 6, y, left - 2, y), FRAME)
        draw.text((left - 10, y - 7), label, TEXT, font, anchor="ra")


def legend(picture: MemoryPicture) -> list[tuple[Colour, str]]:
    """Return a colour and a text for each category in the picture."""
    entries = []
    for name in CATEGORIES:
        if name in picture.pages:
            share = size_text(picture.pages[name] * PAGE_SIZE)
            entries.append((COLOURS[name], f"{name}: {share}, {MEANING[name]}"))
    if "resident" in picture.pages:
        entries.append((BACKGROUND, MEANING["untouched"]))
    return entries


def _legend(
    draw: ImageDraw.ImageDraw,
    entries: list[tuple[Colour, str]],
    left: int,
    top: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    for number, (colour, text) in enumerate(entries):
        x = left + (number % 2) * (COLUMNS * SCALE // 2)
        y = top + 22 * (number // 2)
        draw.rectangle((x, y + 2, x + 12, y + 14), colour, FRAME)
        draw.text((x + 20, y), text, TEXT, font)
