# SPDX-License-Identifier: Apache-2.0
"""The compiled loops and their forms in NumPy mean the same; and what the loops refuse.

The rings' loops are tested with the engines: every test of rings runs on the compiled engine, on
the one in NumPy and on the scalar one.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.driver import Element, make_driver
from tests.fakes.memory import Arena, make_memory

from vballoon.errors import MemoryFault, QueueError
from vballoon.memory import gather, pages
from vballoon.memory.native import BYTES, COUNTED, PAGES, Native, native
from vballoon.skipmap import bits
from vballoon.skipmap.bitmap import PageBitmap
from vballoon.skipmap.layout import BitmapLayout
from vballoon.virtqueue import make_virtqueue
from vballoon_spec.virtio import features as f
from vballoon_spec.walk.formats import WalkRange

CAN_BUILD = shutil.which("gcc") and Path(sysconfig.get_paths()["include"], "Python.h").exists()
U64 = st.integers(0, (1 << 64) - 1)


def test_it_was_built_where_it_can_be() -> None:
    """Otherwise the other tests here would compare NumPy with itself."""
    assert native is not None or os.environ.get("VBALLOON_NATIVE") != "1" or not CAN_BUILD


def u64(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


@contextmanager
def without(*modules: str) -> Iterator[None]:
    """NumPy's form in these modules."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch(f"vballoon.{module}.native", None))
        yield


PURE = ("memory.pages", "memory.gather", "skipmap.bitmap", "skipmap.bits")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 60)), max_size=40), st.booleans())
def test_merging(ranges: list[tuple[int, int]], ordered: bool) -> None:
    if ordered:
        ranges = sorted(ranges)
    start = u64(*(a for a, _ in ranges))
    end = start + u64(*(n for _, n in ranges)) - np.uint64(3)
    end = np.where(end > np.uint64(1 << 63), start, end)
    here = pages.coalesce(start, end)
    with without(*PURE):
        there = pages.coalesce(start, end)
    assert [c.tolist() for c in here] == [c.tolist() for c in there]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 20000), max_size=300),
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
)
def test_page_numbers_become_ranges(numbers: list[int], cuts: list[int]) -> None:
    """In two regions with a hole between them; numbers in the hole and beyond are bad."""
    memory = make_memory((0, 4 << 20), (8 << 20, 16 << 20))
    numbers = [*range(100, 140), *range(90, 60, -1), *numbers]
    data = np.array(numbers, "<u4")
    memory.write(4096, data.tobytes())
    counts = [*cuts, max(0, len(numbers) - sum(cuts))]
    while sum(counts) > len(numbers):
        counts.pop(0)
    words = np.array(counts, np.int64)
    addr = (4096 + 4 * (np.cumsum(words) - words)).astype(np.uint64)
    here = gather.page_ranges(memory, addr, words)
    with without(*PURE):
        there = gather.page_ranges(memory, addr, words)
    assert here[2] == there[2]
    assert [c.tolist() for c in here[:2]] == [c.tolist() for c in there[:2]]
    memory.close()


def layout() -> BitmapLayout:
    regions = [(0, 700), (700, 300), (2048, 5000)]
    return BitmapLayout(
        SimpleNamespace(guest_phys_addr=a << 12, size=n << 12, file_offset=0) for a, n in regions
    )


EDGES = st.one_of(st.integers(0, 7200), U64)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(EDGES, st.one_of(st.integers(0, 900), U64)), max_size=30))
def test_setting_bits(pairs: list[tuple[int, int]]) -> None:
    """Bytes, records and pages; the odd, the clipped and the bad are counted alike."""
    records = np.array(pairs, WalkRange.dtype())
    addr = u64(*(a % (1 << 26) for a, _ in pairs))
    length = np.array([n % (1 << 23) for _, n in pairs], np.uint32)
    first, last = u64(*(a for a, _ in pairs)), u64(*(n for _, n in pairs))
    seen = []
    for pure in (False, True):
        with without(*PURE if pure else ()):
            maps = [PageBitmap(layout()) for _ in range(3)]
            counts = (
                maps[0].set_bytes(addr, length),
                maps[1].set_records(records, 2),
                maps[2].set_ranges(first, last),
                maps[2].clear_ranges(first[:3], last[:3]),
                [m.count() for m in maps],
            )
            seen.append((counts, [m.words.tolist() for m in maps]))
    assert seen[0] == seen[1]


def test_counting() -> None:
    words = np.random.default_rng(1).integers(0, 1 << 64, 100_003, dtype=np.uint64)
    expected = sum(int(w).bit_count() for w in words.tolist())
    assert bits.count(words) == expected
    with without(*PURE):
        assert bits.count(words) == expected


def test_ranges_larger_than_the_bitmap_are_merged_first() -> None:
    """A hostile guest that names all of its memory a thousand times costs one pass."""
    bitmap = PageBitmap(layout())
    start, end = np.zeros(1000, np.uint64), np.full(1000, 7048, np.uint64)
    table = bitmap.layout.table
    if native is not None:
        assert native.mark(bitmap.words, table, start, end, (8, 8), 1000, PAGES, True, 0) is None
    bitmap.set_ranges(start, end)
    assert bitmap.count() == 6000


def test_misuse_is_an_error_and_no_access() -> None:
    if not CAN_BUILD:
        return  # nothing was built, so nothing can be misused
    compiled: Native = importlib.import_module("vballoon.memory._native")  # type: ignore[assignment]
    words, table = np.zeros(8, np.uint64), u64(0, 512, 0)
    a, b = u64(0), u64(64)
    for arguments in (
        (words, u64(0, 513, 0), a, b, (8, 8), 1, PAGES, True, 0),  # past the bitmap
        (words, u64(0, 512, 1), a, b, (8, 8), 1, PAGES, True, 0),
        (words, u64(5, 4, 0), a, b, (8, 8), 1, PAGES, True, 0),
        (words, table, a, b, (8, 8), 2, PAGES, True, 0),  # columns that are too short
        (words, table, a, b, (8, 8), -1, PAGES, True, 0),
        (words, table, a, b, (0, 8), 1, COUNTED, True, 0),
        (words, table, a, np.zeros(3, np.uint8), (8, 4), 1, BYTES, True, 0),
        (words, u64(0, 512), a, b, (8, 8), 1, PAGES, True, 0),
    ):
        with pytest.raises(ValueError, match=r"columns|table|buffer"):
            compiled.mark(*arguments)
    assert not words.any()
    with pytest.raises(ValueError, match="columns"):
        compiled.merge(a, u64(1, 2), a, b)
    with pytest.raises(ValueError, match="columns"):
        compiled.book_given(np.ones(4, np.uint16), np.zeros(2, np.uint16), np.zeros(1, np.uint16))
    with pytest.raises(ValueError, match="columns"):
        compiled.used_split(a, 1, np.zeros(1, np.uint16), np.zeros(1, np.uint32))
    readonly = a.copy()
    readonly.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        compiled.merge(a, b, readonly, b)


def mappings(name: str) -> int:
    return Path("/proc/self/maps").read_text().count(name)


def test_no_table_of_addresses_outlives_its_mapping() -> None:
    """Regions are closed under a table that was in use, and under a ring that goes on."""
    compiled: Native = importlib.import_module("vballoon.memory._native") if CAN_BUILD else None  # type: ignore[assignment]
    memory = make_memory((0, 1 << 20), (1 << 20, 1 << 20))
    before = mappings("memfd:guest")
    driver = make_driver(memory, 8, f.mask(f.VIRTIO_F_INDIRECT_DESC), arena=Arena(0x1000, 0x8000))
    queue = make_virtqueue(memory, 8, driver.addresses, driver.features)
    driver.arena = Arena(1 << 20, 1 << 16)  # tables and buffers are in the other region
    driver.add(driver.buffer(64), indirect=True)
    driver.publish()
    assert len(queue.take()) == 1
    assert memory.tables[0][:, 2].all()
    memory.regions[1].close()
    gc.collect()
    assert mappings("memfd:guest") == before - 1, "something keeps the mapping"
    assert memory.tables[0][:, 2].astype(bool).tolist() == [True, False]
    addr, words, room = u64(1 << 20), np.array([16], np.int64), np.empty(16, np.uint64)
    if compiled is not None:
        assert compiled.page_runs(*memory.tables, addr, words, room, room.copy()) is None
    with pytest.raises(MemoryFault):
        gather.page_ranges(memory, addr, words)
    driver.add(Element(1 << 20, 64))
    slot = driver.free.pop()
    driver.desc[slot] = (1 << 20, 16, 4, 0)  # an indirect table in the region that is gone
    driver.offer([slot])
    driver.publish()
    assert len(queue.take()) == 1  # the one that names memory and does not read it
    with pytest.raises(QueueError):
        queue.take()
