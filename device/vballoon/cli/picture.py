# SPDX-License-Identifier: Apache-2.0
"""Guest memory as a picture: cells and colours, without output.

Memory is split into cells; addresses rise from left to right and from top to bottom.  The colour of
a cell mixes the colours of its categories, weighted by their share of its pages.  Later categories
in :data:`CATEGORIES` are drawn over earlier ones.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vballoon.memory import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vballoon.skipmap import SkipExport

__all__ = ("BACKGROUND", "CATEGORIES", "COLOURS", "MemoryPicture", "PictureRegion")

Colour = tuple[int, int, int]

CATEGORIES = ("resident", "hinted", "walked", "reported", "ballooned")
"""From bottom to top: memory given back to the host is drawn over memory reported free."""
COLOURS: dict[str, Colour] = {
    # Okabe and Ito's palette, which colour-blind people can distinguish
    "resident": (0, 114, 178),
    "hinted": (240, 228, 66),
    "walked": (204, 121, 167),
    "reported": (0, 158, 115),
    "ballooned": (213, 94, 0),
}
BACKGROUND: Colour = (44, 44, 44)
"""Colour of pages that are neither resident nor in any other category."""
MEANING = {
    "resident": "held by the host",
    "hinted": "hinted free",
    "walked": "on the guest's free lists",
    "reported": "reported free, given back, still a hole",
    "ballooned": "in the balloon",
    "untouched": "never touched, not reported",
}
FAINTEST = 0.3
"""Opacity of a cell with a single page, so that it is visible."""


@dataclass(frozen=True, slots=True)
class PictureRegion:
    """One region; *fill* maps a category to one byte for each cell, from 0 to 255."""

    guest_phys_addr: int
    size: int
    fill: dict[str, bytes]

    def cells(self) -> int:
        """Return the number of cells."""
        return len(next(iter(self.fill.values()), b""))

    def colour(self, cell: int) -> Colour:
        """Return the colour of *cell*."""
        red, green, blue = (float(c) for c in BACKGROUND)
        for category in CATEGORIES:
            fill = self.fill[category][cell] if category in self.fill else 0
            if fill:
                alpha = FAINTEST + (1 - FAINTEST) * fill / 255
                over = COLOURS[category]
                red += (over[0] - red) * alpha
                green += (over[1] - green) * alpha
                blue += (over[2] - blue) * alpha
        return int(red), int(green), int(blue)

    def dominant(self, cell: int) -> str | None:
        """Return the topmost category with at least half of *cell*'s pages, else the largest."""
        present = [(self.fill[c][cell], c) for c in CATEGORIES if self.fill.get(c)]
        present = [(fill, c) for fill, c in present if fill]
        if not present:
            return None
        half = [c for fill, c in present if fill >= 128]
        return half[-1] if half else max(present)[1]


@dataclass(frozen=True, slots=True)
class MemoryPicture:
    """All regions, in cells of *cell_bytes* bytes; *pages* are the exact totals."""

    cell_bytes: int
    regions: Sequence[PictureRegion]
    pages: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Size of guest memory in bytes."""
        return sum(r.size for r in self.regions)

    @classmethod
    def from_reply(cls, reply: dict[str, Any]) -> MemoryPicture:
        """Build the picture from the reply to ``query-memory-map``."""
        return cls(
            cell_bytes=reply["cell-pages"] * PAGE_SIZE,
            regions=[
                PictureRegion(
                    r["guest-phys-addr"],
                    r["size"],
                    {name: base64.b64decode(data) for name, data in r["fill"].items()},
                )
                for r in reply["regions"]
            ],
            pages=reply["pages"],
        )

    @classmethod
    def from_export(cls, export: SkipExport, cells: int) -> MemoryPicture:
        """Build the picture from an exported bitmap, which does not record resident pages."""
        from vballoon.skipmap.cells import cell_pages, fill_of_cells

        pages = cell_pages(export.layout, cells)
        bitmaps = {p.value: export.raw_bitmap(p) for p in export.provenances}
        return cls(
            cell_bytes=pages * PAGE_SIZE,
            regions=[
                PictureRegion(
                    r.guest_phys_addr,
                    r.size,
                    {n: fill_of_cells(b, i, pages).tobytes() for n, b in bitmaps.items()},
                )
                for i, r in enumerate(export.layout.regions)
            ],
            pages=dict(export.manifest.pages),
        )
