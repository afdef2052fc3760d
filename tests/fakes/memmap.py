# SPDX-License-Identifier: Apache-2.0
"""Page structures of a fake guest, as a stopped Linux has them in memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tests.fakes.memory import make_memory

from vballoon.balloon.memmap import MemmapLayout
from vballoon_spec.walk.formats import WalkMemmap, WalkMemmapRun

if TYPE_CHECKING:
    from vballoon.memory import GuestMemory

BASE = 0xFFFFEA0000000000
ANCHOR = 0xFFFF888000100000
"""Address of the heads of the free lists, outside the page structures."""
SIZE = 64
HEADER = WalkMemmap(
    witness_value=0x5EED_0F_A_B007_1234,
    witness_pfn=5,
    base=BASE,
    layout_id=1,
    nr_buffers=1,
    nr_runs=1,
    page_shift=12,
    size=SIZE,
    section_pages=32768,
    max_order=10,
    type_offset=48,
    type_mask=0xFF000000,
    type_value=0xF0000000,
    order_offset=40,
    refcount_offset=52,
    list_offset=8,
    flags_offset=0,
    node_shift=54,
    node_mask=0x3FF,
    zone_shift=52,
    zone_mask=3,
)

STRUCTURE = np.dtype(
    {
        "names": ["flags", "next", "prev", "private", "type", "refcount"],
        "formats": ["<u8", "<u8", "<u8", "<u8", "<u4", "<u4"],
        "offsets": [0, 8, 16, 40, 48, 52],
        "itemsize": SIZE,
    }
)


@dataclass
class Area:
    """Page structures of the pages [pfn, pfn + num), at addr."""

    pfn: int
    num: int
    addr: int
    node: int = 0
    zone: int = 1


@dataclass
class MadeUpGuest:
    """Guest memory with page structures in it.

    *blocks* are (pfn, order); those of one order, node and zone make up one list.
    """

    areas: list[Area] = field(default_factory=lambda: [Area(0, 4096, 0x100000)])
    blocks: list[tuple[int, int]] = field(
        default_factory=lambda: [(1024, 10), (2048, 9), (512, 3), (520, 0), (522, 0), (530, 1)]
    )
    memory: GuestMemory = field(default_factory=make_memory)

    def __post_init__(self) -> None:
        self.tables = {
            area.pfn: np.frombuffer(
                self.memory.window(area.addr, area.num * SIZE), STRUCTURE, area.num
            )
            for area in self.areas
        }
        for area in self.areas:
            table = self.tables[area.pfn]
            table["flags"] = (area.node << HEADER.node_shift) | (area.zone << HEADER.zone_shift)
            table["refcount"] = 1
            table["type"] = 0xFFFFFFFF
        self.page(HEADER.witness_pfn)["private"] = HEADER.witness_value
        self._link()

    def page(self, pfn: int) -> Any:
        """Return a writable view of the structure of page *pfn*."""
        for area in self.areas:
            if area.pfn <= pfn < area.pfn + area.num:
                return self.tables[area.pfn][pfn - area.pfn]
        raise KeyError(pfn)

    def _link(self) -> None:
        lists: dict[int, list[int]] = {}
        for pfn, order in self.blocks:
            page = self.page(pfn)
            page["type"], page["refcount"], page["private"] = 0xF0000000, 0, order
            lists.setdefault(ANCHOR + 0x40 * order, []).append(pfn)
        for anchor, pfns in lists.items():
            nodes = [anchor, *(BASE + SIZE * pfn + HEADER.list_offset for pfn in pfns), anchor]
            for i, pfn in enumerate(pfns):
                self.page(pfn)["prev"], self.page(pfn)["next"] = nodes[i], nodes[i + 2]

    def layout(self, **changes: int) -> MemmapLayout:
        """Return the layout as the guest module reports it, with the fields *changes* replaced."""
        runs = np.zeros(len(self.areas), WalkMemmapRun.dtype())
        for run, area in zip(runs, self.areas, strict=True):
            for name in ("pfn", "num", "addr", "node", "zone"):
                run[name] = getattr(area, name)
        header = replace(HEADER, **changes) if changes else HEADER
        return MemmapLayout(header=header, runs=runs, partial=False)
