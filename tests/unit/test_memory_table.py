# SPDX-License-Identifier: Apache-2.0
"""Guest memory: regions and the table of them, against arithmetic on plain Python integers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.descriptors import open_fds
from tests.fakes.memory import by_messages, column, make_memory, memfd

from vballoon.errors import MemoryFault, ProtocolError
from vballoon.memory import BitmapLog, GuestMemory, MemoryRegion
from vballoon.memory.records import reachable, read_records

PAGE, MIB, HIGH = 4096, 1 << 20, 1 << 32
REGIONS = ((0, MIB), (MIB, PAGE), (4 * MIB, 2 * PAGE), (HIGH, MIB))
SPANS = [(0, MIB + PAGE), (4 * MIB, 4 * MIB + 2 * PAGE), (HIGH, HIGH + MIB)]


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    made = make_memory(*REGIONS)
    rng = np.random.default_rng(7)
    for region in made.regions:
        assert region.view is not None
        region.view[:] = rng.integers(0, 256, region.size, np.uint8)
    yield made
    made.close()


def inside(addr: int, length: int) -> bool:
    """Return whether a region holds the range, with integers that cannot overflow."""
    return any(low <= addr and addr + length <= high for low, high in SPANS)


EDGES = [e for span in SPANS for e in span] + [1 << 63, (1 << 64) - 1, HIGH - 1]
ADDRESS = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 5 * MIB),
    st.sampled_from(EDGES).flatmap(lambda e: st.integers(max(0, e - 9), min((1 << 64) - 1, e + 9))),
)
LENGTH = st.one_of(
    st.integers(0, 20), st.integers(0, 2 * MIB), st.integers(0, (1 << 64) - 1), st.just(HIGH - 1)
)


@settings(max_examples=300)
@given(st.lists(st.tuples(ADDRESS, LENGTH), max_size=30))
def test_contains_is_what_integers_say(memory: GuestMemory, ranges: list[tuple[int, int]]) -> None:
    addrs, lengths = column([a for a, _ in ranges]), column([n for _, n in ranges])
    expected = [inside(a, n) for a, n in ranges]
    assert memory.contains(addrs, lengths).tolist() == expected
    assert [memory.holds(a, n) for a, n in ranges] == expected
    short = lengths & np.uint64(0xFFFFFFFF)
    assert memory.contains(addrs, short.astype(np.uint32)).tolist() == [
        inside(a, int(n)) for (a, _), n in zip(ranges, short, strict=True)
    ]


def test_contains_without_memory() -> None:
    none = GuestMemory()
    assert none.contains(column([0, 5]), column([0, 1])).tolist() == [False, False]
    assert (none.size, none.end, none.mapped, none.holds(0, 0)) == (0, 0, False, False)


@given(st.lists(st.tuples(ADDRESS, LENGTH), min_size=1, max_size=5))
def test_locate_finds_the_region_or_faults(
    memory: GuestMemory, ranges: list[tuple[int, int]]
) -> None:
    expected = []
    for addr, length in ranges:
        within = [
            (i, addr - start)
            for i, (start, size) in enumerate(REGIONS)
            if start <= addr and addr + length <= start + size
        ]
        expected.append(within[-1] if within else None)
    addrs, lengths = column([a for a, _ in ranges]), column([n for _, n in ranges])
    if None in expected:
        with pytest.raises(MemoryFault):
            memory.locate(addrs, lengths)
    else:
        region, offset = memory.locate(addrs, lengths)
        assert list(zip(region.tolist(), offset.tolist(), strict=True)) == expected


@given(st.integers(0, MIB + PAGE), st.integers(0, 3 * PAGE))
def test_read_joins_adjacent_regions(memory: GuestMemory, addr: int, length: int) -> None:
    low, high = memory.regions[:2]
    assert low.view is not None
    assert high.view is not None
    whole = low.view.tobytes() + high.view.tobytes()
    if addr + length <= len(whole):
        assert memory.read(addr, length) == whole[addr : addr + length]
    else:
        with pytest.raises(MemoryFault):
            memory.read(addr, length)


def test_write_is_read_back_marked_and_all_or_nothing() -> None:
    memory = make_memory(*REGIONS)
    memory.dirty_log = log = BitmapLog(np.zeros(1 << 18, np.uint8))
    memory.write(MIB - 3, b"abcdef")
    assert memory.read(MIB - 4, 8) == b"\0abcdef\0"
    assert np.flatnonzero(log.bitmap).tolist() == [(MIB - 3) >> 15, (MIB + 2) >> 15]
    log.bitmap[:] = 0
    with pytest.raises(MemoryFault):
        memory.write(MIB + PAGE - 2, b"1234")  # half of it would fit
    assert memory.read(MIB + PAGE - 2, 2) == b"\0\0"
    assert not log.bitmap.any()
    memory.close()


def test_window_is_the_memory_itself(memory: GuestMemory) -> None:
    window = memory.window(4 * MIB + 8, 8)
    old = window.copy()
    memory.write(4 * MIB + 8, b"12345678")
    assert window.tobytes() == b"12345678"
    window[:] = old
    assert memory.read(4 * MIB + 8, 8) == old.tobytes()


@pytest.mark.parametrize(
    ("addr", "length"),
    [(MIB - 4, 8), (2 * MIB, 1), (4 * MIB + 2 * PAGE, 1), (HIGH, MIB + 1), (0, -1), (-1, 1)],
)
def test_window_faults(memory: GuestMemory, addr: int, length: int) -> None:
    with pytest.raises(MemoryFault):
        memory.window(addr, length)


def test_from_userspace(memory: GuestMemory) -> None:
    base = 1 << 46
    assert memory.from_userspace(base + 17) == 17
    assert memory.from_userspace(base + HIGH + MIB - 1) == HIGH + MIB - 1
    for outside in (0, base - 1, base + MIB + PAGE, base + HIGH + MIB, (1 << 64) - 1):
        with pytest.raises(MemoryFault):
            memory.from_userspace(outside)


def test_memory_by_messages(memory: GuestMemory) -> None:
    other, peer = by_messages(memory)
    assert other.mapped is False
    assert other.read(MIB - 4, 8) == memory.read(MIB - 4, 8)
    assert peer.reads == 2
    other.write(8, memory.read(8, 4))
    assert peer.writes == 1
    with pytest.raises(MemoryFault):
        other.window(0, 8)
    peer.dma_read = lambda addr, size: b"short"  # type: ignore[method-assign]
    with pytest.raises(MemoryFault, match="short"):
        other.read(0, 8)


def test_memory_of_nobody() -> None:
    memory = GuestMemory([MemoryRegion(guest_phys_addr=0, size=PAGE)])
    for access in (lambda: memory.read(0, 1), lambda: memory.write(0, b"x")):
        with pytest.raises(MemoryFault):
            access()


def test_regions_are_sorted_and_may_not_overlap() -> None:
    a, b = (MemoryRegion(guest_phys_addr=g, size=2 * PAGE) for g in (8 * PAGE, 0))
    memory = GuestMemory([a, b])
    assert memory.regions == (b, a)
    assert (memory.size, memory.end) == (4 * PAGE, 10 * PAGE)
    with pytest.raises(ProtocolError, match="memory-region-overlap"):
        GuestMemory([a, b, MemoryRegion(guest_phys_addr=PAGE, size=PAGE)])


# regions


@pytest.mark.parametrize(
    ("rule", "kwargs"),
    [
        ("memory-region-address", {"guest_phys_addr": (1 << 64) - PAGE}),
        ("memory-region-address", {"guest_phys_addr": (1 << 64) - PAGE, "size": 2 * PAGE}),
        ("memory-region-address", {"size": 0}),
        ("memory-region-address", {"size": 1 << 64}),
        ("memory-region-address", {"guest_phys_addr": -PAGE}),
        ("memory-region-userspace", {"userspace_addr": (1 << 64) - PAGE}),
        ("memory-region-alignment", {"guest_phys_addr": 1}),
        ("memory-region-alignment", {"size": PAGE + 1}),
        ("memory-region-alignment", {"file_offset": 512}),
        ("memory-region-file", {"size": 5 * PAGE}),
        ("memory-region-file", {"file_offset": 4 * PAGE}),
        ("memory-region-file", {"file_offset": (1 << 64) - PAGE}),
    ],
)
def test_bad_regions_are_refused_and_their_descriptor_closed(
    rule: str, kwargs: dict[str, int]
) -> None:
    before = open_fds()
    good: dict[str, Any] = {"guest_phys_addr": 0, "size": PAGE, "file_offset": 0}
    with pytest.raises(ProtocolError) as caught:
        MemoryRegion.map(**good | kwargs, fd=memfd(4 * PAGE))
    assert caught.value.rule == rule
    assert open_fds() == before


def test_a_descriptor_that_is_no_memory() -> None:
    before = open_fds()
    read, write = os.pipe()
    for fd in (read, write):
        with pytest.raises(ProtocolError):
            MemoryRegion.map(guest_phys_addr=0, size=PAGE, file_offset=0, fd=fd)
    with pytest.raises(ProtocolError, match="memory-region-map"):
        MemoryRegion.map(guest_phys_addr=0, size=PAGE, file_offset=0, fd=9999)
    assert open_fds() == before


def test_file_offset_is_where_the_region_starts() -> None:
    fd = memfd(4 * PAGE)
    os.pwrite(fd, b"here", 3 * PAGE)
    region = MemoryRegion.map(guest_phys_addr=HIGH, size=PAGE, file_offset=3 * PAGE, fd=fd)
    memory = GuestMemory([region])
    assert memory.read(HIGH, 4) == b"here"
    memory.close()


def test_a_read_only_file_is_not_written_to(tmp_path: object) -> None:
    path = f"{tmp_path}/ram"
    with open(path, "wb") as file:
        file.truncate(PAGE)
    where: dict[str, Any] = {"guest_phys_addr": 0, "size": PAGE, "file_offset": 0}
    with pytest.raises(ProtocolError, match="memory-region-map"):
        MemoryRegion.map(**where, fd=os.open(path, os.O_RDONLY))
    region = MemoryRegion.map(**where, fd=os.open(path, os.O_RDONLY), writable=False)
    memory = GuestMemory([region])
    with pytest.raises(MemoryFault, match="memory-read-only"):
        memory.write(0, b"x")
    memory.close()


def test_closing_lets_go_of_everything_but_windows_stay_readable() -> None:
    before = open_fds()
    memory = make_memory((0, MIB))
    memory.write(0, b"late")
    window = memory.window(0, 4)
    memory.close()
    memory.close()
    assert window.tobytes() == b"late"
    with pytest.raises(MemoryFault):
        memory.window(0, 4)
    del window
    assert open_fds() == before


# many small tables in one go


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.integers(0, MIB + PAGE - 16),
                st.integers(HIGH, HIGH + MIB - 16),
                st.integers(0, MIB // 16 - 1).map(lambda i: i * 16),
            ),
            st.integers(1, 5),
        ),
        max_size=20,
    )
)
def test_records_are_read_from_anywhere(memory: GuestMemory, tables: list[tuple[int, int]]) -> None:
    addr, count = column([a for a, _ in tables]), np.array([n for _, n in tables], np.intp)
    good = reachable(memory, addr, (count * 16).astype(np.uint64))
    expected = [any(s <= a and a + 16 * n <= s + size for s, size in REGIONS) for a, n in tables]
    assert good.tolist() == expected
    rows = read_records(memory, addr[good], count[good])
    wanted = [memory.read(a, 16 * n) for (a, n), ok in zip(tables, expected, strict=True) if ok]
    assert rows.tobytes() == b"".join(wanted)
    assert rows.shape == (sum(len(w) for w in wanted) // 16, 2)
