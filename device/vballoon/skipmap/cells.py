# SPDX-License-Identifier: Apache-2.0
"""A downsampled bitmap: guest memory split into cells, and the fill of each cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vballoon.skipmap.bitmap import PageBitmap
    from vballoon.skipmap.layout import BitmapLayout

__all__ = ("FULL", "cell_pages", "fill_of_cells")

FULL = 255
"""Fill of a cell whose pages are all set; a cell with any page set has at least 1."""
SMALLEST_CELL = 8
"""Minimum pages of a cell: one byte of the bitmap."""


def cell_pages(layout: BitmapLayout, cells: int) -> int:
    """Return the smallest power of two pages for which guest memory has at most *cells* cells.

    A cell belongs to one region, so tiny regions need a few more cells.
    """
    size = SMALLEST_CELL
    while sum(-(-r.pages // size) for r in layout.regions) > max(cells, len(layout.regions)):
        size *= 2
    return size


def fill_of_cells(bitmap: PageBitmap, index: int, pages: int) -> NDArray[np.uint8]:
    """Return the fill of each cell of *pages* pages of region *index*, 0 to :data:`FULL`."""
    region, words = bitmap.layout.regions[index], bitmap.region(index)
    cells = -(-region.pages // pages)
    per_byte = np.zeros(cells * pages // 8, dtype=np.uint8)
    for low, high in bitmap.spans():
        a = max(low - region.first_word, 0) * 8
        b = min((high - region.first_word) * 8, words.size * 8, per_byte.size)
        if a < b:
            np.bitwise_count(words.view(np.uint8)[a:b], out=per_byte[a:b])
    filled = per_byte.reshape(cells, pages // 8).sum(axis=1, dtype=np.uint64)
    held = np.full(cells, pages, dtype=np.uint64)
    if region.pages % pages:
        held[-1] = region.pages % pages
    fill: NDArray[np.uint64] = (filled * np.uint64(FULL) + held - np.uint64(1)) // held
    return fill.astype(np.uint8)
