# SPDX-License-Identifier: Apache-2.0
"""Verified skip finds the free blocks exactly, and refuses whatever is off by the smallest bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.memmap import BASE, HEADER, Area, MadeUpGuest
from tests.fakes.memory import make_memory

from vballoon.memory import PageRanges
from vballoon.snapshot.memmap import VerificationRefused, free_memory

MIB = 1 << 20


def pages_of(guest: MadeUpGuest) -> set[int]:
    return {pfn + i for pfn, order in guest.blocks for i in range(1 << order)}


def found(ranges: PageRanges) -> set[int]:
    return set(ranges.numbers().tolist())


def test_finds_every_free_page_and_no_other() -> None:
    guest = MadeUpGuest()
    free = free_memory(guest.layout(), guest.memory)
    assert found(free.ranges) == pages_of(guest)
    assert (free.blocks, free.pages, free.loose) == (6, 1024 + 512 + 8 + 1 + 1 + 2, 0)


def test_guest_without_a_free_page() -> None:
    guest = MadeUpGuest(blocks=[])
    assert free_memory(guest.layout(), guest.memory).pages == 0


def test_adjacent_blocks_make_one_range() -> None:
    guest = MadeUpGuest(blocks=[(512, 3), (520, 3), (528, 4)])
    assert free_memory(guest.layout(), guest.memory).ranges.tolist() == [[512, 544]]


def test_runs_of_several_nodes_and_zones_in_any_order() -> None:
    areas = [Area(2048, 1024, 0x200000, 1, 2), Area(0, 1024, 0x80000), Area(1024, 1024, 0x300000)]
    blocks = [(512, 9), (1024, 10), (2048, 9), (3000, 3)]
    guest = MadeUpGuest(areas, blocks)
    assert found(free_memory(guest.layout(), guest.memory).ranges) == pages_of(guest)


def test_structures_across_two_regions() -> None:
    memory = make_memory((0, 2 * MIB), (2 * MIB, 14 * MIB))
    areas = [Area(0, 4096, 0x100000)]
    whole = MadeUpGuest(areas, memory=make_memory())
    memory.write(0x100000, whole.memory.read(0x100000, 4096 * 64))
    assert found(free_memory(whole.layout(), memory).ranges) == pages_of(whole)
    areas = [Area(0, 4096, 2 * MIB - 4096 * 32)]
    whole = MadeUpGuest(areas, memory=make_memory())
    memory.write(areas[0].addr, whole.memory.read(areas[0].addr, 4096 * 64))
    assert found(free_memory(whole.layout(), memory).ranges) == pages_of(whole)


def test_larger_guest_pages() -> None:
    guest = MadeUpGuest([Area(0, 64, 0x8000)], [(8, 3), (32, 4)], make_memory((0, 4 * MIB)))
    free = free_memory(guest.layout(page_shift=16), guest.memory)
    assert free.ranges.tolist() == [[8 << 4, 16 << 4], [32 << 4, 48 << 4]]


LAYOUTS = {
    "witness value": {"witness_value": HEADER.witness_value + 1},
    "witness page": {"witness_pfn": 6},
    "witness outside": {"witness_pfn": 5000},
    "witness far outside": {"witness_pfn": (1 << 64) - 1},
    "witness that is an order": {"witness_value": 9},
    "type": {"type_mask": 0},
    "type value": {"type_value": 0xF0000001},
    "field outside": {"flags_offset": 60},
    "list outside": {"list_offset": 56},
    "field unaligned": {"order_offset": 41},
    "size zero": {"size": 0},
    "size odd": {"size": 63},
    "size huge": {"size": 1 << 31},
    "size other": {"size": 56},
    "page shift": {"page_shift": 40},
    "order limit": {"max_order": 9},
    "order limit absurd": {"max_order": 64},
    "node": {"node_shift": 52},
    "node shift": {"node_shift": 64},
    "zone": {"zone_mask": 0},
    "base": {"base": BASE + 64},
    "no base": {"base": 0},
    "last base": {"base": (1 << 64) - 8},
    "list offset": {"list_offset": 16},
}


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_that_does_not_fit_is_refused(changes: dict[str, int]) -> None:
    guest = MadeUpGuest(blocks=[(1024 + 8 * i, 3) for i in range(100)] + [(2048, 10)])
    with pytest.raises(VerificationRefused):
        free_memory(guest.layout(**changes), guest.memory)


def set_word(pfn: int, name: str, value: int) -> Callable[[MadeUpGuest], None]:
    return lambda guest: guest.page(pfn).__setitem__(name, value)


CORRUPTIONS = {
    "reference": set_word(1024, "refcount", 1),
    "order above the limit": set_word(1024, "private", 11),
    "order beyond all": set_word(1024, "private", 1 << 63),
    "alignment": set_word(512, "private", 10),
    "overlap": set_word(1024 + 512, "type", 0xF0000000),
    "node": set_word(2048, "flags", 1 << 54 | 1 << 52),
    "zone": set_word(2048, "flags", 2 << 52),
    "witness gone": set_word(5, "private", 0),
    "witness's node": set_word(5, "flags", 1 << 54 | 1 << 52),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_structure_that_does_not_fit_is_refused(corrupt: Callable[[MadeUpGuest], None]) -> None:
    guest = MadeUpGuest()
    corrupt(guest)
    if guest.page(1536)["type"] == 0xF0000000:
        guest.page(1536)["refcount"] = 0
    with pytest.raises(VerificationRefused):
        free_memory(guest.layout(), guest.memory)


RUNS = {
    "no runs": [],
    "pages overlap": [Area(0, 4096, 0x100000), Area(4000, 100, 0x200000)],
    "addresses overlap": [Area(0, 4096, 0x100000), Area(4096, 64, 0x100000)],
    "outside memory": [Area(0, 4096, 16 * MIB - 4096)],
    "wraps": [Area((1 << 64) - 64, 4096, 0x100000)],
    "absurd": [Area(0, (1 << 64) - 1, 0x100000)],
    "empty": [Area(0, 4096, 0x100000), Area(5000, 0, 0x200000)],
    "other node": [Area(0, 4096, 0x100000, node=1)],
    "block leaves run": [Area(0, 1500, 0x100000)],
    "block leaves zone": [Area(0, 1500, 0x100000), Area(1500, 2596, 0x100000 + 1500 * 64, zone=2)],
}


@pytest.mark.parametrize("areas", RUNS.values(), ids=RUNS)
def test_runs_that_cannot_be_are_refused(areas: list[Area]) -> None:
    guest = MadeUpGuest()
    guest.areas = areas
    with pytest.raises(VerificationRefused):
        free_memory(guest.layout(), guest.memory)


def test_free_block_outside_memory_is_refused() -> None:
    guest = MadeUpGuest([Area(0, 8192, 0x100000)], [(4096, 10)])
    with pytest.raises(VerificationRefused, match="outside guest memory"):
        free_memory(guest.layout(), guest.memory)


def test_more_free_than_managed_is_refused() -> None:
    guest = MadeUpGuest()
    assert free_memory(guest.layout(), guest.memory, managed_pages=1548).pages == 1548
    with pytest.raises(VerificationRefused):
        free_memory(guest.layout(), guest.memory, managed_pages=1547)


POISON_NEXT, POISON_PREV = 0xDEAD000000000100, 0xDEAD000000000122


def node(pfn: int) -> int:
    return BASE + 64 * pfn + HEADER.list_offset


def test_block_just_taken_out_of_its_list_is_left_alone() -> None:
    """list_del has run, the mark is still there: only this block is dropped."""
    blocks = [(512 + 8 * i, 3) for i in range(8)]
    guest = MadeUpGuest(blocks=blocks)
    page = guest.page(528)
    guest.page(520)["next"], guest.page(536)["prev"] = page["next"], page["prev"]
    page["next"], page["prev"] = POISON_NEXT, POISON_PREV
    free = free_memory(guest.layout(), guest.memory)
    assert free.loose == 1
    assert found(free.ranges) == pages_of(guest) - set(range(528, 536))


def test_block_half_put_into_its_list_is_left_alone() -> None:
    """The new block points nowhere yet, the next one points back at it already."""
    guest = MadeUpGuest(blocks=[(512 + 8 * i, 3) for i in range(8)])
    new = guest.page(1024)
    new["type"], new["refcount"], new["private"] = 0xF0000000, 0, 3
    guest.page(512)["prev"] = node(1024)
    free = free_memory(guest.layout(), guest.memory)
    assert found(free.ranges) <= pages_of(guest)
    assert 1 <= free.loose <= 3


def test_block_linked_to_itself_is_left_alone() -> None:
    guest = MadeUpGuest(blocks=[(512, 3), (1024, 10)])
    guest.page(512)["next"] = guest.page(512)["prev"] = node(512)
    free = free_memory(guest.layout(), guest.memory)
    assert (found(free.ranges), free.loose) == (set(range(1024, 2048)), 1)


def test_single_block_of_a_list_needs_its_anchor_twice() -> None:
    guest = MadeUpGuest(blocks=[(512, 3), (1024, 10)])
    guest.page(512)["next"] = POISON_NEXT
    free = free_memory(guest.layout(), guest.memory)
    assert (found(free.ranges), free.loose) == (set(range(1024, 2048)), 1)


def test_many_unlinked_blocks_are_a_reason_to_refuse() -> None:
    guest = MadeUpGuest(blocks=[(1024 + 2 * i, 0) for i in range(100)])
    for pfn, _ in guest.blocks:
        guest.page(pfn)["next"] = node(pfn)
    with pytest.raises(VerificationRefused, match="in no list"):
        free_memory(guest.layout(), guest.memory)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4095), st.integers(0, 7), st.binary(min_size=8, max_size=8)),
        max_size=12,
    ),
    st.dictionaries(
        st.sampled_from([n for n in vars(HEADER) if not n.startswith("_")]),
        st.integers(0, (1 << 32) - 1) | st.integers(0, 70),
        max_size=2,
    ),
)
def test_whatever_the_guest_writes_has_one_of_two_outcomes(
    writes: list[tuple[int, int, bytes]], changes: dict[str, int]
) -> None:
    guest = MadeUpGuest()
    for pfn, word, value in writes:
        guest.memory.write(0x100000 + 64 * pfn + 8 * word, value)
    try:
        free = free_memory(guest.layout(**changes), guest.memory)
    except VerificationRefused:
        return
    assert (free.ranges.start < free.ranges.end).all()
    assert (free.ranges.start[1:] > free.ranges.end[:-1]).all()
    assert int(free.ranges.end.max(initial=0)) <= 4096
