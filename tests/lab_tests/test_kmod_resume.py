# SPDX-License-Identifier: Apache-2.0
"""What the walk finds while others change the free lists: ``walk.c`` compiled for userspace.

A free block may rely on WALK-R7: if it stays in its list for all of the walk, it is reported.
Between two slices lists are rotated, and blocks come, go and come back, as in a guest under load.
"""

from __future__ import annotations

import base64
import ctypes
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.lab import kernel

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]
HERE = Path(__file__).resolve().parent
DRIVER = HERE.parents[1] / "driver_kmod"
HEADERS = (
    "export", "list", "memory_hotplug", "mm", "mmzone", "page-flags", "sched", "sched/clock",
    "spinlock", "types",
)  # fmt: skip
START, END = 3, 253
"""The zone; neither end is aligned."""
ORDERS = range(3)
ELSEWHERE = range(64, 72)
"""Pages of another zone, and pages that are offline, within the zone."""
OFFLINE = (*range(96, 104), *range(200, 208))
SLICE_NS = 1000
Gap = list[tuple[str, int]]
"""What others do between two slices."""

RELAX = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
REPORT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
UNLOCKED = ctypes.CFUNCTYPE(None)


class FreeWalk(ctypes.Structure):
    """``struct free_walk`` of ``walk.h``."""

    _fields_ = (
        ("slice_ns", ctypes.c_uint),
        ("relax", RELAX),
        ("blocks", ctypes.c_uint64),
        ("pages", ctypes.c_uint64),
        ("slices", ctypes.c_uint32),
        ("longest_hold_ns", ctypes.c_uint32),
        ("zones", ctypes.c_uint32),
        ("overlong", ctypes.c_uint32),
    )


def compiled(source: Path, folder: Path) -> Any:
    """Return the walk of *source* as a library, with the userspace kernel around it."""
    folder = shutil.copytree(HERE / "kmod_userspace", folder / "userspace")
    for name in ("walk.c", "walk.h"):
        shutil.copy(source / name, folder)
    for name in (*(f"linux/{n}.h" for n in HEADERS), "compat.h", "hotplug.h", "params.h"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('#include "kernel.h"\n')
    script = (
        "gcc -Wall -Wextra -Wno-sign-compare -Werror -O2 -shared -fPIC -I. -o w.so "
        "walk.c allocator.c && base64 w.so"
    )
    status, text = kernel("6.12").run_in_root(folder, ["sh", "-c", script])
    assert status == 0, text
    path = folder / "walk.so"
    path.write_bytes(base64.b64decode(text))
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compiled(DRIVER, tmp_path_factory.mktemp("walk"))


def usable(pfn: int, order: int) -> bool:
    pages = range(pfn, pfn + (1 << order))
    return pages[0] >= START and pages[-1] < END and not {*pages} & {*ELSEWHERE, *OFFLINE}


PLACES = {o: [pfn for pfn in range(0, 256, 1 << o) if usable(pfn, o)] for o in ORDERS}


@dataclass
class Guest:
    """Free blocks, the walk of them, and others."""

    library: Any
    gaps: list[Gap]
    rooms: list[int]
    orders: range = ORDERS
    clock_step: int = 0
    unlocked: list[Gap] = field(default_factory=list)
    """What others do while the walk reads page structures without the lock."""
    free: dict[int, tuple[int, int]] = field(default_factory=dict)
    """The order and the migrate type of each free block, by its first page."""
    taken: list[tuple[int, int]] = field(default_factory=list)
    reported: list[tuple[int, int]] = field(default_factory=list)
    stayed: set[tuple[int, int]] = field(default_factory=set)
    relaxed: int = 0
    lookups: int = 0

    def __post_init__(self) -> None:
        self._callback = UNLOCKED(self._look_up)
        step = ctypes.c_uint64(self.clock_step)
        self.library.zone_make(ctypes.c_ulong(START), ctypes.c_ulong(END), step, self._callback)
        for pfn in ELSEWHERE:
            self.library.page_elsewhere(ctypes.c_ulong(pfn))
        for pfn in OFFLINE:
            self.library.page_offline(ctypes.c_ulong(pfn))

    def fill(self, numbers: list[int]) -> None:
        for number in numbers:
            self.add("add_tail", number)
        self.stayed = {(pfn, order) for pfn, (order, _) in self.free.items()}

    def _fits(self, pfn: int, order: int) -> bool:
        pages = range(pfn, pfn + (1 << order))
        return not any(
            first < pages[-1] + 1 and pages[0] < first + (1 << o)
            for first, (o, _) in self.free.items()
        )

    def add(self, where: str, number: int) -> None:
        """Free the block that was taken last or, if *number* is odd, any other one."""
        order = self.orders[number % len(self.orders)]
        pfn = PLACES[order][number % len(PLACES[order])]
        if number % 2 == 0 and self.taken:
            pfn, order = self.taken.pop()
        if not self._fits(pfn, order):
            return
        kind = number // 2 % 2
        self.library.add(ctypes.c_ulong(pfn), order, kind, where == "add_tail")
        self.free[pfn] = (order, kind)

    def change(self, what: str, number: int) -> None:
        if what.startswith("add"):
            self.add(what, number)
        elif self.free:
            pfn = list(self.free)[number % len(self.free)]
            order, kind = self.free[pfn]
            if what == "rotate":
                self.library.rotate(ctypes.c_ulong(pfn), kind)
                return
            self.library.take(ctypes.c_ulong(pfn), ctypes.c_ulong(number % 5))
            del self.free[pfn]
            self.taken.append((pfn, order))
            self.stayed.discard((pfn, order))

    def _gap(self, gaps: list[Gap], turn: int) -> None:
        assert self.library.lock_depth() == 0
        for what, number in gaps[turn % len(gaps)]:
            self.change(what, number)

    def _look_up(self) -> None:
        self.lookups += 1
        if self.unlocked:
            self._gap(self.unlocked, self.lookups)

    def relax(self, _opaque: int | None) -> int:
        assert self.library.hotplug_lock_depth() == 0
        if self.relaxed:
            self._gap(self.gaps, self.relaxed - 1)
        self.relaxed += 1
        return self.rooms[self.relaxed % len(self.rooms)]

    def report(self, _opaque: int | None, pfn: int, num: int) -> int:
        assert self.library.lock_depth() == 1
        order = num.bit_length() - 1
        assert num == 1 << order
        assert pfn in self.free  # WALK-R6
        assert self.free[pfn][0] == order
        self.reported.append((pfn, order))
        return 0

    def walk(self, min_order: int = 0) -> FreeWalk:
        walk = FreeWalk(slice_ns=SLICE_NS, relax=RELAX(self.relax))
        assert not self.library.walk_free_mem_block_paced(
            None, min_order, REPORT(self.report), ctypes.byref(walk)
        )
        assert self.library.lock_depth() == 0
        assert self.library.hotplug_lock_depth() == 0
        assert walk.blocks == len(self.reported)
        assert walk.pages == sum(1 << order for _, order in self.reported)
        orders = [order for _, order in self.reported]
        assert orders == sorted(orders, reverse=True)
        assert {block for block in self.stayed if block[1] >= min_order} <= set(self.reported)
        return walk


WHAT = ("add_front", "add_tail", "take", "rotate")


def changes(*what: str) -> st.SearchStrategy[list[Gap]]:
    one = st.tuples(st.sampled_from(what), st.integers(0, 999))
    return st.lists(st.lists(one, max_size=6), min_size=1, max_size=12)


rooms = st.lists(st.integers(1, 40), min_size=1, max_size=4)
blocks = st.lists(st.integers(0, 999), max_size=60)
steps = st.sampled_from([0, 60, 300, 2000])


@settings(max_examples=1000, deadline=None)
@given(
    numbers=blocks,
    gaps=changes(*WHAT),
    unlocked=st.just([]) | changes(*WHAT),
    rooms=rooms,
    clock_step=steps,
    min_order=st.integers(0, 2),
)
def test_what_stays_in_its_list_is_reported(
    library: Any,
    numbers: list[int],
    gaps: list[Gap],
    unlocked: list[Gap],
    rooms: list[int],
    clock_step: int,
    min_order: int,
) -> None:
    guest = Guest(library, gaps, rooms, clock_step=clock_step, unlocked=unlocked)
    guest.fill(numbers)
    guest.walk(min_order)


@settings(max_examples=500, deadline=None)
@given(numbers=blocks, gaps=changes("add_front", "add_tail", "take"), rooms=rooms)
@example(
    # A walk that resumed lists passed over a block that stayed: two others left and came back.
    numbers=[1, 3],
    gaps=[
        [("add_front", 0), ("add_tail", 5), ("add_tail", 7), ("add_tail", 9)],
        [("take", 5)],
        [("add_tail", 0), ("take", 93), ("add_tail", 0)],
    ],
    rooms=[1],
)
@example(
    # The block read first leaves and comes back between two rotations.
    numbers=[1, 3, 5, 7],
    gaps=[[("rotate", 1), ("take", 0), ("add_tail", 0), ("rotate", 2)]],
    rooms=[1],
)
def test_blocks_may_come_back(
    library: Any, numbers: list[int], gaps: list[Gap], rooms: list[int]
) -> None:
    guest = Guest(library, gaps, rooms, orders=range(1))
    guest.fill(numbers)
    guest.walk()


@settings(max_examples=100, deadline=None)
@given(numbers=blocks, rooms=rooms, clock_step=st.sampled_from([0, 100]))
def test_lists_that_keep_still_are_read_once(
    library: Any, numbers: list[int], rooms: list[int], clock_step: int
) -> None:
    """Only a list whose reading ran out of time is begun anew, by page number."""
    guest = Guest(library, [[]], rooms, clock_step=clock_step)
    guest.fill(numbers)
    guest.walk()
    assert set(guest.reported) == guest.stayed
    if not clock_step:
        assert len(guest.reported) == len(guest.stayed)


def test_a_list_that_fits_into_a_slice_is_read_without_looking_at_other_pages(
    library: Any,
) -> None:
    guest = Guest(library, [[]], [100])
    guest.fill(list(range(1, 20, 2)))
    assert guest.walk().slices == len({order for order, _ in guest.free.values()})
    assert guest.lookups == 0


def test_a_list_that_never_keeps_still_costs_no_more_than_its_zone(library: Any) -> None:
    """Rotations on every slice neither prolong the walk nor hide a block."""
    guest = Guest(library, [[("rotate", 0)], [("rotate", 57)]], [3], orders=range(1))
    guest.fill(list(range(1, 200, 2)))
    walk = guest.walk()
    assert len(guest.reported) == len(guest.stayed) == 100
    assert walk.slices <= (END - START) // 3
