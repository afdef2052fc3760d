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
from tests.fakes.driver import Element, SplitDriver, make_driver
from tests.fakes.memory import Arena, make_memory

from vballoon.errors import MemoryFault, QueueError
from vballoon.memory import ByteRanges, MemoryRegion, discard, gather, pages, ranges
from vballoon.native import Native, native
from vballoon.skipmap import Provenance, SkipMap, bitmap, bits
from vballoon.skipmap.bitmap import PageBitmap
from vballoon.skipmap.layout import BitmapLayout
from vballoon.virtqueue import Engine, make_virtqueue
from vballoon_spec.walk.formats import WalkRange
from virtio_formats.virtio import features as f

CAN_BUILD = shutil.which("gcc") and Path(sysconfig.get_paths()["include"], "Python.h").exists()
U64 = st.integers(0, (1 << 64) - 1)


def test_it_was_built_where_it_can_be() -> None:
    """Otherwise the other tests here would compare NumPy with itself."""
    assert native is not None or os.environ.get("VBALLOON_NATIVE") == "0" or not CAN_BUILD


def u64(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


@contextmanager
def without(*modules: str) -> Iterator[None]:
    """NumPy's form in these modules."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch(f"vballoon.{module}.native", None))
        yield


PURE = ("memory.pages", "memory.ranges", "memory.gather", "skipmap.bitmap", "skipmap.bits")


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
    assert here == there
    memory.close()


def test_page_numbers_that_make_many_runs() -> None:
    """More of them than there is room for at first."""
    memory = make_memory((0, 1 << 30))
    count = gather.FEW_RUNS + 1000
    memory.write(4096, np.arange(0, 2 * count, 2, dtype="<u4").tobytes())
    addr, words = u64(4096), np.array([count], np.int64)
    found, bad = gather.page_ranges(memory, addr, words)
    assert (found.start == np.arange(0, 2 * count, 2, dtype=np.uint64)).all()
    assert ((found.end - found.start == 1).all(), bad) == (True, 0)
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
                maps[2]._fill(first, last, True),
                maps[2]._fill(first[:3], last[:3], False),
                [m.count() for m in maps],
            )
            seen.append((counts, [m.words.tolist() for m in maps]))
    assert seen[0] == seen[1]


BYTES = st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1), st.booleans())
TOP = st.tuples(st.integers((1 << 64) - 9000, (1 << 64) - 1), st.integers(0, 9000), st.booleans())
NEAR = st.tuples(st.integers(0, 90_000), st.integers(0, 90_000), st.booleans())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(NEAR, TOP, BYTES), max_size=60))
def test_blocks(pieces: list[tuple[int, int, bool]]) -> None:
    """The whole pages of byte ranges, merged, whatever their order; also next to 2^64."""
    addr = u64(*(a for a, _, _ in pieces))
    length = np.array([n for _, n, _ in pieces], np.uint32)
    wanted = np.array([w for _, _, w in pieces], np.bool_)
    here = ranges.blocks(addr, length, wanted)
    with without(*PURE):
        there = ranges.blocks(addr, length, wanted)
    assert here == there
    assert here[0].total == there[0].total


@pytest.mark.parametrize("bits_used", [6, 16, 40, 63])
def test_merging_many(bits_used: int) -> None:
    """Enough ranges for the sort by digits, in every width of start."""
    rng = np.random.default_rng(bits_used)
    for count in (24, 25, 300, 5000):
        start = rng.integers(0, 1 << bits_used, count, dtype=np.uint64)
        end = start + rng.integers(0, 1 << 10, count, dtype=np.uint64)
        here = pages.coalesce(start, end)
        with without(*PURE):
            there = pages.coalesce(start, end)
        assert (here[0] == there[0]).all()
        assert (here[1] == there[1]).all()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1 << 25), st.integers(1, 1 << 22)), max_size=30),
    st.sampled_from([4096, 2 << 20]),
)
def test_ranges_of_a_file(pieces: list[tuple[int, int]], unit: int) -> None:
    """Only what is in the region, and of that whole pages of the file."""
    region = MemoryRegion(guest_phys_addr=3 << 20, size=9 << 20, file_offset=5 << 12)
    region.page_size = unit
    wanted = ByteRanges.of((a, a + n) for a, n in pieces)
    here = discard._units_in_file(region, wanted)
    with without("memory.discard"):
        there = discard._units_in_file(region, wanted)
    assert here == there
    assert here.total == there.total


RECORDS = st.lists(st.tuples(EDGES, st.one_of(st.integers(0, 900), U64)), max_size=20)


@settings(max_examples=200, deadline=None)
@given(st.lists(RECORDS, min_size=1, max_size=6), st.sampled_from([1, 2, 4]))
def test_records_are_read_where_they_are(buffers: list[list[tuple[int, int]]], least: int) -> None:
    """At any alignment, in two regions; a buffer that is too much is left, and so are the rest."""
    memory = make_memory((0, 1 << 20), (1 << 20, 1 << 20))
    skipmap, other = PageBitmap(layout()), PageBitmap(layout())
    at, addr, pages_due, bad_due = (1 << 20) - 64 * 16 + 4, [], 0, 0
    for records in buffers:
        data = np.array(records, WalkRange.dtype()).tobytes()
        if at < 1 << 20 < at + len(data):
            at = 1 << 20  # in one region
        memory.write(at, data)
        addr.append(at)
        at += len(data)
    counts = np.array([len(records) for records in buffers], np.int64)
    done, pages_done, bad = skipmap.set_guest_records(memory, u64(*addr), counts, least)
    assert done == len(buffers) or native is None or sum(n for b in buffers for _, n in b) > 7000
    for records in buffers[:done]:
        found, left_out = other.set_records(np.array(records, WalkRange.dtype()), least)
        pages_due, bad_due = pages_due + found, bad_due + left_out
    assert (pages_done, bad) == (pages_due, bad_due)
    if done == len(buffers):
        assert (skipmap.words == other.words).all()
    memory.close()


@pytest.mark.parametrize("inputs", [1, 2, 4])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 1003])
@pytest.mark.parametrize("skew", [0, 1])
def test_uniting(inputs: int, size: int, skew: int) -> None:
    """At any size, also where the result is not aligned to 16 bytes; nothing beside it changes."""
    rng = np.random.default_rng(size)
    room = np.full(size + 4, 7, np.uint64)
    out = room[1 + skew : 1 + skew + size]
    words = [rng.integers(0, 1 << 64, size, dtype=np.uint64) for _ in range(inputs)]
    bitmap._unite(out, [(0, w) for w in words], clear=True)
    assert out.tolist() == np.bitwise_or.reduce(words).tolist()
    assert (np.delete(room, range(1 + skew, 1 + skew + size)) == 7).all()


def test_counting() -> None:
    for size in (0, 1, 3, 7, 8, 9, 31):
        words = np.full(size, 3, np.uint64)
        assert bits.count(words) == 2 * size
    words = np.random.default_rng(1).integers(0, 1 << 64, 100_003, dtype=np.uint64)
    expected = sum(int(w).bit_count() for w in words.tolist())
    assert bits.count(words) == expected
    with without(*PURE):
        assert bits.count(words) == expected


def test_ranges_larger_than_the_bitmap_are_merged_first() -> None:
    """A hostile guest that names all of its memory a thousand times costs one pass."""
    filled = PageBitmap(layout())
    start, end = np.zeros(1000, np.uint64), np.full(1000, 7048, np.uint64)
    table = filled.layout.table
    if native is not None:
        assert native.mark_pages(filled.words, table, start, end, True) is None
    filled._fill(start, end, True)
    assert filled.count() == 6000


def test_misuse_is_an_error_and_no_access() -> None:
    if not CAN_BUILD:
        return  # nothing was built, so nothing can be misused
    compiled: Native = importlib.import_module("vballoon.native._native")  # type: ignore[assignment]
    words, table, a, b = np.zeros(8, np.uint64), u64(0, 512, 0), u64(0), u64(64)
    one, two = np.zeros(1, np.uint16), np.zeros(2, np.uint16)
    for bad_table in (u64(0, 513, 0), u64(0, 512, 1), u64(5, 4, 0), u64(0, 512)):  # past the bitmap
        with pytest.raises(ValueError, match=r"table|buffer"):
            compiled.mark_pages(words, bad_table, a, b, True)
    memory = make_memory()
    extents, spans, _ = memory.tables
    for call in (
        lambda: compiled.mark_pages(words, table, a, u64(1, 2), True),
        lambda: compiled.mark_bytes(words, table, a, np.zeros(2, np.uint32)),
        lambda: compiled.mark_records(words, table, a, 1),
        lambda: compiled.mark_records(words, table, u64(0, 1), 0),
        lambda: compiled.mark_guest_records(words, table, memory.tables, a, u64(1, 1), 1),
        lambda: compiled.mark_guest_records(words, table, (extents, spans, []), a, b, 1),
        lambda: compiled.unite(words, a),
        lambda: compiled.merge(a, u64(1, 2), a, b),
        lambda: compiled.blocks(a, np.zeros(1, np.uint32), np.zeros(2, np.bool_), a, b),
        lambda: compiled.in_file(a, b, a, b, (0, 4096, 0, 4095)),
        lambda: compiled.in_file(a, b, a, b, (4096, 0, 0, 4096)),
        lambda: compiled.in_file(a, b, u64(), b, (0, 4096, 0, 4096)),
        lambda: compiled.page_runs(memory.tables, a, np.zeros(2, np.int64), a.copy(), b),
        lambda: compiled.book_given(np.ones(4, np.uint16), two, one),
        lambda: compiled.used_split(a, 1, one, np.zeros(1, np.uint32)),
        lambda: compiled.used_packed(u64(0, 0), 0, True, two, np.zeros(2, np.uint32), two),
    ):
        with pytest.raises(ValueError, match=r"columns|table|buffer"):
            call()
    assert not words.any()
    readonly = a.copy()
    readonly.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        compiled.merge(a, b, readonly, b)


def mappings(name: str) -> int:
    gc.collect()  # what earlier tests left in reference cycles is not counted
    return Path("/proc/self/maps").read_text().count(name)


def test_no_address_outlives_its_mapping() -> None:
    """A region is closed under a ring, a batch and a table that were in use."""
    memory = make_memory((0, 1 << 20), (1 << 20, 1 << 20))
    before = mappings("memfd:guest")
    driver = make_driver(memory, 8, f.mask(f.VIRTIO_F_INDIRECT_DESC), arena=Arena(0x1000, 0x8000))
    queue = make_virtqueue(memory, 8, driver.addresses, driver.features)
    driver.arena = Arena(1 << 20, 1 << 16)  # tables and buffers are in the other region
    driver.add(driver.buffer(64), indirect=True)
    driver.publish()
    batch = queue.take()
    assert len(batch) == 1
    addr, words = u64(1 << 20), np.array([16], np.int64)
    assert len(gather.page_ranges(memory, addr, words)[0]) == 1
    memory.regions[1].close()
    gc.collect()
    assert mappings("memfd:guest") == before - 1, "something keeps the mapping"
    assert [view is None for view in memory.tables[2]] == [False, True]
    with pytest.raises(MemoryFault):
        gather.page_ranges(memory, addr, words)
    if native is not None:
        room = np.empty(16, np.uint64)
        assert native.page_runs(memory.tables, addr, words, room, room.copy()) is None
    assert SkipMap(memory).set_guest_records(Provenance.WALKED, memory, addr, u64(1), 1)[0] == 0
    with pytest.raises(MemoryFault):
        batch.readable(0, 64)
    assert isinstance(driver, SplitDriver)
    driver.add(Element(1 << 20, 64))
    slot = driver.free.pop()
    driver.desc[slot] = (1 << 20, 16, 4, 0)  # an indirect table in the region that is gone
    driver.offer([slot])
    driver.publish()
    assert len(queue.take()) == 1  # the one that names memory and does not read it
    with pytest.raises(QueueError):
        queue.take()


def test_a_mapping_stays_for_as_long_as_its_tables_are_in_hand() -> None:
    """What a call was given is good until it returns, whoever closes the region meanwhile."""
    memory = make_memory()
    memory.write(0, np.arange(40, 56, dtype="<u4").tobytes())
    before, tables = mappings("memfd:guest"), memory.tables
    memory.close()
    gc.collect()
    assert mappings("memfd:guest") == before
    if native is not None:
        start, end = np.empty(16, np.uint64), np.empty(16, np.uint64)
        assert native.page_runs(tables, u64(0), np.array([16], np.int64), start, end) == (1, 0)
        assert (start[0], end[0]) == (40, 56)
    del tables
    gc.collect()
    assert mappings("memfd:guest") == before - 1


def test_whole_pages_next_to_the_end_are_not_the_first_ones() -> None:
    """Rounding up there must not wrap to page 0, from where on everything would be named."""
    addr, length = u64((1 << 64) - 100), np.array([50], np.uint32)
    first, last, _ = pages.whole_pages(addr, length)
    assert first[0] >= last[0]
    filled = PageBitmap(layout())
    filled.set_bytes(addr, length)
    assert filled.count() == 0
    assert not len(ranges.blocks(addr, length, np.ones(1, np.bool_))[0])


@pytest.mark.parametrize("engine", ["scalar", "numpy", "batch"])
def test_an_empty_element_at_zero_needs_memory_there_too(engine: Engine) -> None:
    memory = make_memory((1 << 20, 1 << 20))
    driver = make_driver(memory, 8, 0, arena=Arena(1 << 20, 0x8000))
    queue = make_virtqueue(memory, 8, driver.addresses, driver.features, engine=engine)
    driver.add(Element(0, 0))
    driver.publish()
    with pytest.raises(QueueError):
        queue.take()


def test_a_ring_whose_region_goes_away_is_served_from_what_it_has() -> None:
    """It reads old memory instead of faulting, and lets go of it when it is dropped itself."""
    for features in (0, f.mask(f.VIRTIO_F_RING_PACKED)):
        memory = make_memory((0, 1 << 20), (1 << 20, 1 << 20))
        before = mappings("memfd:guest")
        driver = make_driver(memory, 8, features, arena=Arena(1 << 20, 0x8000))
        queue = make_virtqueue(memory, 8, driver.addresses, driver.features)
        driver.add(Element(0x2000, 64))
        driver.publish()
        memory.regions[1].close()
        batch = queue.take()
        assert batch.addr.tolist() == [0x2000]
        queue.give(batch.ids, np.zeros(1, np.uint32))
        assert driver.collect()
        del queue, driver, batch
        gc.collect()
        assert mappings("memfd:guest") == before - 1
