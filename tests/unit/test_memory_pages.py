# SPDX-License-Identifier: Apache-2.0
"""The algebra of page ranges, against Python sets."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.memory import column

from vballoon.memory.pages import clip, coalesce, expand, inward

TOP = (1 << 64) - 1
RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=15)
PAGES = st.lists(st.integers(0, 60), max_size=30)


def columns(ranges: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return column([a for a, _ in ranges]), column([b for _, b in ranges])


def numbers(ranges: list[tuple[int, int]]) -> set[int]:
    return {n for a, b in ranges for n in range(a, b)}


def pairs(start: np.ndarray, end: np.ndarray) -> list[tuple[int, int]]:
    assert start.dtype == end.dtype == np.uint64
    return list(zip(start.tolist(), end.tolist(), strict=True))


@given(RANGES)
def test_coalesce_keeps_the_set_and_merges_it(ranges: list[tuple[int, int]]) -> None:
    merged = pairs(*coalesce(*columns(ranges)))
    assert numbers(merged) == numbers(ranges)
    assert all(a < b for a, b in merged)
    assert all(one[1] < two[0] for one, two in pairwise(merged))


@given(PAGES)
def test_expand_of_coalesce_is_sorted_and_unique(pages: list[int]) -> None:
    start = column(pages)
    assert expand(*coalesce(start, start + np.uint64(1))).tolist() == sorted(set(pages))


@given(RANGES)
def test_expand_lists_each_range_in_turn(ranges: list[tuple[int, int]]) -> None:
    ranges = [(min(r), max(r)) for r in ranges]
    assert expand(*columns(ranges)).tolist() == [n for a, b in ranges for n in range(a, b)]


@given(RANGES, st.integers(0, 60), st.integers(0, 60))
def test_clip(ranges: list[tuple[int, int]], low: int, high: int) -> None:
    clipped = pairs(*clip(*columns(ranges), low, high))
    assert numbers(clipped) == numbers(ranges) & set(range(low, high))
    assert all(low <= a < b <= high for a, b in clipped)


@given(RANGES, st.integers(1, 9))
def test_inward_keeps_whole_units_only(ranges: list[tuple[int, int]], unit: int) -> None:
    expected = [
        {
            n
            for u in range(12 * 9)
            if a <= u * unit and (u + 1) * unit <= b
            for n in range(u * unit, (u + 1) * unit)
        }
        for a, b in ranges
    ]
    found = pairs(*inward(*columns(ranges), unit))
    assert [numbers([r]) for r in found] == [e for e in expected if e]
    assert all(a % unit == b % unit == 0 for a, b in found)


def test_the_top_of_64_bits() -> None:
    start, end = columns([(TOP - 5, TOP), (TOP - 4096, TOP), (0, 4095)])
    assert pairs(*inward(start, end, 4096)) == []
    assert pairs(*coalesce(start, end)) == [(0, 4095), (TOP - 4096, TOP)]
    assert pairs(*clip(start, end, TOP - 3, TOP)) == [(TOP - 3, TOP)] * 2
    assert expand(*columns([(TOP - 2, TOP)])).tolist() == [TOP - 2, TOP - 1]
