# SPDX-License-Identifier: Apache-2.0
"""Giving memory back: what is freed, and above all what is not."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.memory import by_messages, column, make_memory, memfd

from vballoon.memory import ByteRanges, Discarder, GuestMemory, MemoryRegion, data_extents
from vballoon.memory.regions import backing_page_size

PAGE, MIB, HIGH = 4096, 1 << 20, 1 << 32
HUGE = 2 * MIB
GUARD = 16 * PAGE  # bytes of the file before and after the guest's


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = full_memory()
    yield made
    made.close()


def full_memory() -> GuestMemory:
    """Two regions in the middle of one file, every byte of which is data."""
    fd = memfd(GUARD + 2 * MIB + GUARD)
    regions = [
        MemoryRegion.map(guest_phys_addr=g, size=MIB, file_offset=at, fd=os.dup(fd))
        for g, at in ((0, GUARD), (HIGH, GUARD + MIB))
    ]
    os.pwrite(fd, b"\xaa" * (2 * GUARD + 2 * MIB), 0)
    os.close(fd)
    return GuestMemory(regions)


def held(memory: GuestMemory) -> list[set[int]]:
    """For each region, its pages (numbers within it) that hold data."""
    return [
        {
            page
            for low, high in data_extents(r).tolist()
            for page in range(low // PAGE, high // PAGE)
        }
        for r in memory.regions
    ]


def file_pages(memory: GuestMemory) -> set[int]:
    """Pages of the whole file that still read as it was filled."""
    fd = memory.regions[0].fd
    assert fd is not None
    size = os.fstat(fd).st_size
    whole = np.frombuffer(os.pread(fd, size, 0), np.uint8).reshape(-1, PAGE)
    return set(np.flatnonzero((whole == 0xAA).all(axis=1)).tolist())


BOUND = st.one_of(
    st.integers(0, 2 * MIB),
    st.integers(HIGH - MIB, HIGH + 2 * MIB),
    st.integers(0, 300).map(lambda p: p * PAGE),
    st.sampled_from([0, MIB, HIGH, HIGH + MIB, (1 << 64) - 1, (1 << 64) - PAGE]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(BOUND, BOUND), max_size=12))
def test_exactly_the_whole_pages_inside_guest_memory_go(ranges: list[tuple[int, int]]) -> None:
    memory = full_memory()
    freed = Discarder().discard(memory, ByteRanges.of(ranges))
    gone = set()
    for first, (base, _) in ((GUARD, (0, MIB)), (GUARD + MIB, (HIGH, MIB))):
        covered = np.zeros(MIB, np.bool_)
        for a, b in ranges:
            if a < b:
                covered[max(a - base, 0) : max(b - base, 0)] = True
        whole = np.flatnonzero(covered.reshape(-1, PAGE).all(axis=1))
        gone |= {first // PAGE + int(page) for page in whole}
    everything = set(range((2 * GUARD + 2 * MIB) // PAGE))
    assert file_pages(memory) == everything - gone
    assert freed == len(gone) * PAGE
    memory.close()


def test_what_was_freed_is_a_hole_and_reads_as_zero(memory: GuestMemory) -> None:
    start = column([8 * PAGE])
    assert Discarder().discard(memory, ByteRanges(start, start + np.uint64(PAGE))) == PAGE
    assert held(memory) == [set(range(256)) - {8}, set(range(256))]
    assert memory.read(8 * PAGE, PAGE) == bytes(PAGE)


def test_a_hundred_thousand_shuffled_duplicates_are_merged_in_milliseconds() -> None:
    memory = make_memory((0, 512 * MIB))
    pages = np.arange(100_000, dtype=np.uint64) % np.uint64(50_000)
    np.random.default_rng(1).shuffle(pages)
    start = pages * np.uint64(PAGE)
    discarder, best = Discarder(), 1.0
    for _ in range(5):
        begin = time.perf_counter()
        assert (
            discarder.discard(memory, ByteRanges(start, start + np.uint64(PAGE))) == 50_000 * PAGE
        )
        best = min(best, time.perf_counter() - begin)
    # A call for each page would take a quarter of a second at least.
    assert best < 0.06
    memory.close()


def test_not_enabled_frees_nothing(memory: GuestMemory) -> None:
    discarder = Discarder(enabled=False)
    assert discarder.discard(memory, ByteRanges(column([0]), column([MIB]))) == 0
    assert held(memory)[0] == set(range(256))


def test_memory_without_a_file_is_left_alone(memory: GuestMemory) -> None:
    other, peer = by_messages(memory)
    assert Discarder().discard(other, ByteRanges([0], [MIB])) == 0
    assert peer.writes == 0


@pytest.mark.parametrize("how", ["read-only", "sealed"])
def test_a_file_that_cannot_be_punched_is_reported_once(
    how: str, caplog: pytest.LogCaptureFixture, tmp_path: object
) -> None:
    if how == "sealed":
        fd = memfd(MIB, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    else:
        with open(f"{tmp_path}/ram", "wb") as file:
            file.write(b"x" * MIB)
        fd = os.open(f"{tmp_path}/ram", os.O_RDONLY)
    bad = MemoryRegion.map(guest_phys_addr=0, size=MIB, file_offset=0, fd=fd, writable=False)
    good = make_memory((HIGH, MIB)).regions[0]
    memory, discarder = GuestMemory([bad, good]), Discarder()
    for _ in range(3):
        assert discarder.discard(memory, ByteRanges(column([0]), column([HIGH + MIB]))) == MIB
    assert discarder.refused == 1
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    memory.close()


def test_what_the_guest_can_only_read_is_not_freed_for_it() -> None:
    """A ROM whose file happens to be open for writing: it is the host's data."""
    fd = memfd(MIB)
    os.pwrite(fd, b"rom", 0)
    rom = MemoryRegion.map(
        guest_phys_addr=0, size=MIB, file_offset=0, fd=os.dup(fd), writable=False
    )
    memory = GuestMemory([rom])
    assert Discarder().discard(memory, ByteRanges(column([0]), column([MIB]))) == 0
    assert os.pread(fd, 3, 0) == b"rom"
    memory.close()
    os.close(fd)


# huge pages: the rules do not depend on what backs the memory, so an ordinary file is used


def test_the_page_size_of_a_file_is_found_out() -> None:
    for flags, size in ((os.MFD_HUGETLB | os.MFD_HUGE_2MB, HUGE), (0, PAGE)):
        fd = os.memfd_create("pages", flags)
        assert backing_page_size(fd) == size
        os.close(fd)
    assert backing_page_size(9999) == PAGE


def huge_memory(offset: int = 0) -> GuestMemory:
    """8 MiB at 1 MiB, backed by 2 MiB pages that start on even addresses of the file."""
    fd = memfd(offset + 8 * MIB)
    os.pwrite(fd, b"\xaa" * (8 * MIB), offset)
    region = MemoryRegion.map(guest_phys_addr=MIB, size=8 * MIB, file_offset=offset, fd=fd)
    region.page_size = HUGE
    return GuestMemory([region])


def give(d: Discarder, m: GuestMemory, low: int, high: int, **kwargs: bool) -> int:
    return d.discard(m, ByteRanges(column([low]), column([high])), **kwargs)


def test_only_whole_huge_pages_go() -> None:
    memory, d = huge_memory(), Discarder()
    assert give(d, memory, MIB + PAGE, 7 * MIB + PAGE) == 4 * MIB
    assert held(memory) == [set(range(512)) | set(range(1536, 2048))]
    memory.close()


@pytest.mark.parametrize("offset", [0, MIB])
def test_huge_pages_are_those_of_the_file(offset: int) -> None:
    memory, d = huge_memory(offset), Discarder()
    # The region starts `offset` into a huge page of its file: the first whole one begins there.
    assert give(d, memory, MIB, 3 * MIB + offset) == HUGE
    first = offset // PAGE
    assert held(memory) == [set(range(2048)) - set(range(first, first + 512))]
    memory.close()


def test_parts_of_a_huge_page_add_up_only_where_that_is_safe() -> None:
    memory = huge_memory()
    pieces = [
        (MIB + p * PAGE, MIB + (p + 1) * PAGE) for p in np.random.default_rng(3).permutation(512)
    ]
    for accumulate, expected in ((False, 0), (True, HUGE)):
        d = Discarder()
        freed = [give(d, memory, a, b, accumulate=accumulate) for a, b in pieces]
        assert sum(freed) == expected
        assert not any(freed[:-1])
    memory.close()


def test_undo_takes_a_part_back() -> None:
    memory, d = huge_memory(), Discarder()
    assert give(d, memory, MIB, 2 * MIB, accumulate=True) == 0
    byte = MIB + 7 * PAGE + 1  # of page 7
    d.undo(memory, ByteRanges([byte], [byte + 1]))
    assert give(d, memory, 2 * MIB, 3 * MIB, accumulate=True) == 0  # page 7 is in use
    assert give(d, memory, MIB + 6 * PAGE, MIB + 7 * PAGE, accumulate=True) == 0
    assert held(memory) == [set(range(2048))]
    assert give(d, memory, MIB + 7 * PAGE, MIB + 8 * PAGE, accumulate=True) == HUGE
    memory.close()


def test_after_a_part_was_taken_back_the_huge_page_goes_again() -> None:
    memory, d = huge_memory(), Discarder()
    assert give(d, memory, MIB, 5 * MIB, accumulate=True) == 4 * MIB
    d.undo(memory, ByteRanges(column([MIB + PAGE]), column([MIB + 2 * PAGE])))
    memory.write(MIB + PAGE, b"in use")
    assert give(d, memory, MIB, MIB + PAGE, accumulate=True) == 0
    assert memory.read(MIB + PAGE, 6) == b"in use"
    assert give(d, memory, MIB + PAGE, MIB + 2 * PAGE, accumulate=True) == HUGE
    memory.close()


def test_reset_and_closed_regions_are_forgotten() -> None:
    memory, d = huge_memory(), Discarder()
    assert give(d, memory, MIB, 2 * MIB, accumulate=True) == 0
    d.forget()
    assert give(d, memory, 2 * MIB, 3 * MIB, accumulate=True) == 0
    memory.close()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["give", "undo"]), st.integers(0, 2047), st.integers(1, 700)),
        max_size=12,
    )
)
def test_no_page_that_was_taken_back_is_ever_lost(steps: list[tuple[str, int, int]]) -> None:
    """The guest writes to every page that it takes back; what it wrote is there at the end."""
    memory, d = huge_memory(), Discarder()
    view = memory.regions[0].view
    assert view is not None
    pages = view.reshape(2048, PAGE)
    mine = np.ones(2048, np.bool_)
    for what, page, count in steps:
        low, high = MIB + page * PAGE, MIB + (page + count) * PAGE
        if what == "give":
            mine[page : page + count] = False
            give(d, memory, low, high, accumulate=True)
        else:
            d.undo(memory, ByteRanges(column([low]), column([high])))
            mine[page : page + count] = True
            pages[page : page + count] = 0xAA
        assert (pages[mine] == 0xAA).all()
    whole = ~mine.reshape(4, 512).any(axis=1)
    assert not view.reshape(4, HUGE)[whole].any()
    memory.close()


# the truth about freed pages


def test_data_extents() -> None:
    fd = memfd(64 * PAGE)
    region = MemoryRegion.map(guest_phys_addr=HIGH, size=16 * PAGE, file_offset=16 * PAGE, fd=fd)
    assert data_extents(region).tolist() == []
    for page in (15, 16, 20, 21, 31, 32, 40):
        os.pwrite(fd, b"x", page * PAGE)
    assert data_extents(region).pages().tolist() == [[0, 1], [4, 6], [15, 16]]
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0  # a peer may share the position
    region.close()


def test_where_holes_cannot_be_seen_everything_is_data() -> None:
    assert data_extents(MemoryRegion(guest_phys_addr=0, size=PAGE)).tolist() == [[0, PAGE]]
    read, write = os.pipe()
    odd = MemoryRegion(guest_phys_addr=0, size=PAGE, fd=read)
    assert data_extents(odd).tolist() == [[0, PAGE]]
    os.close(read)
    os.close(write)
