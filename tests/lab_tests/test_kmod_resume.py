# SPDX-License-Identifier: Apache-2.0
"""How the walk resumes a free list: ``walk.c`` in userspace, others changing the list meanwhile.

What a free block may count on is WALK-R7: if it stays in its list for all of the walk, it is
reported. Between two slices the list is rotated, and blocks come and go, as in a guest under load.
"""

from __future__ import annotations

import base64
import ctypes
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.lab import kernel

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]
HERE = Path(__file__).resolve().parent
DRIVER = HERE.parents[1] / "driver_kmod"
HEADERS = ("export", "list", "mm", "mmzone", "sched", "sched/clock", "spinlock", "types")
MOST = 200
"""Free blocks: a zone is finite."""
Gap = list[tuple[str, int]]
"""What others do between two slices."""

RELAX = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
REPORT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)


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
        ("cut", ctypes.c_bool),
    )


def compiled(source: Path, folder: Path) -> Any:
    """Compile the walk of *source* with the userspace kernel around it."""
    folder = shutil.copytree(HERE / "kmod_userspace", folder / "userspace")
    for name in ("walk.c", "walk.h"):
        shutil.copy(source / name, folder)
    for name in (*(f"linux/{n}.h" for n in HEADERS), "compat.h", "vbw.h"):
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


@dataclass
class Guest:
    """A free list, the walk of it, and others."""

    library: Any
    gaps: list[Gap]
    rooms: list[int]
    free: list[int] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    reported: list[int] = field(default_factory=list)
    stayed: set[int] = field(default_factory=set)
    again: bool = False
    """A block that left may come back; else what comes is another."""
    slices: int = 0
    number: int = 0

    def fill(self, count: int) -> None:
        self.library.list_make_empty()
        for _ in range(count):
            self.add("add_tail")
        self.stayed = set(self.free)

    def add(self, where: str) -> None:
        if self.again and self.taken:
            pfn = self.taken.pop()
        else:
            self.number += 1
            pfn = self.number
        getattr(self.library, where)(ctypes.c_ulong(pfn))
        self.free.append(pfn)

    def change(self, what: str, number: int) -> None:
        if what.startswith("add"):
            if len(self.free) < MOST:
                self.add(what)
        elif self.free:
            front = what == "allocate"
            pfn = self.library.front() if front else self.free[number % len(self.free)]
            getattr(self.library, "take" if front else what)(ctypes.c_ulong(pfn))
            if what != "rotate":
                self.free.remove(pfn)
                self.taken.append(pfn)
                self.stayed.discard(pfn)

    def relax(self, _opaque: int | None) -> int:
        assert self.library.lock_depth() == 0
        if self.slices:
            for what, number in self.gaps[(self.slices - 1) % len(self.gaps)]:
                self.change(what, number)
        self.slices += 1
        return self.rooms[self.slices % len(self.rooms)]

    def report(self, _opaque: int | None, pfn: int, num: int) -> int:
        assert (self.library.lock_depth(), num) == (1, 1)
        self.reported.append(pfn)
        return 0

    def walk(self) -> FreeWalk:
        walk = FreeWalk(relax=RELAX(self.relax))
        assert not self.library.walk_free_mem_block_paced(
            None, 0, REPORT(self.report), ctypes.byref(walk)
        )
        assert (walk.blocks, walk.slices) == (len(self.reported), self.slices)
        return walk


def changes(*what: str) -> st.SearchStrategy[list[Gap]]:
    one = st.tuples(st.sampled_from(what), st.integers(0, 99))
    return st.lists(st.lists(one, max_size=4), min_size=1, max_size=12)


rooms = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@settings(max_examples=500, deadline=None)
@given(
    count=st.integers(0, 30), gaps=changes("add_front", "add_tail", "take", "rotate"), rooms=rooms
)
def test_what_stays_in_its_list_is_reported(
    library: Any, count: int, gaps: list[Gap], rooms: list[int]
) -> None:
    guest = Guest(library, gaps, rooms)
    guest.fill(count)
    if not guest.walk().cut:
        assert guest.stayed <= set(guest.reported)


@settings(max_examples=500, deadline=None)
@given(count=st.integers(0, 30), gaps=changes("add_front", "add_tail", "take"), rooms=rooms)
def test_blocks_may_come_back(library: Any, count: int, gaps: list[Gap], rooms: list[int]) -> None:
    guest = Guest(library, gaps, rooms, again=True)
    guest.fill(count)
    if not guest.walk().cut:
        assert guest.stayed <= set(guest.reported)


@settings(max_examples=100, deadline=None)
@given(count=st.integers(0, 60), rooms=rooms)
def test_a_list_that_keeps_still_is_read_once(library: Any, count: int, rooms: list[int]) -> None:
    guest = Guest(library, [[]], rooms)
    guest.fill(count)
    assert not guest.walk().cut
    assert sorted(guest.reported) == sorted(guest.free)


def test_allocations_from_the_front_do_not_send_the_walk_back(library: Any) -> None:
    """The allocator takes blocks from the front and frees to it, all the time."""
    guest = Guest(library, [[("add_front", 0)] * 2 + [("allocate", 0)] * 3], [4])
    guest.fill(400)
    assert not guest.walk().cut
    assert guest.stayed <= set(guest.reported)
    assert len(guest.reported) < 450


def test_a_list_that_never_keeps_still_is_left(library: Any) -> None:
    guest = Guest(library, [[("rotate", 0)], [("rotate", 57)]], [3])
    guest.fill(100)
    assert guest.walk().cut
    assert len(guest.reported) < 4 * 100 + 1024 + 3
