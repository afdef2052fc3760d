# SPDX-License-Identifier: Apache-2.0
"""Page ranges and byte ranges are sets: every operation agrees with Python's own sets."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.rig import Rig

from vballoon.memory import PAGE_SIZE, ByteRanges, PageRanges, pages

PAIRS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=15)
BYTES = st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 40_000)), max_size=8)


def members(found: PageRanges | ByteRanges) -> set[int]:
    return set(found.numbers().tolist())


def python_set(pairs: list[tuple[int, int]]) -> set[int]:
    return {n for start, end in pairs for n in range(start, end)}


def canonical(found: PageRanges | ByteRanges) -> bool:
    return bool((found.start < found.end).all() and (found.start[1:] > found.end[:-1]).all())


@settings(max_examples=200, deadline=None)
@given(PAIRS, PAIRS, st.integers(0, 60), st.integers(0, 60))
def test_set_operations(
    one: list[tuple[int, int]], two: list[tuple[int, int]], low: int, high: int
) -> None:
    a, b = PageRanges.of(one), PageRanges.of(two)
    left, right = python_set(one), python_set(two)
    results = {
        "itself": (a, left),
        "or": (a | b, left | right),
        "sub": (a - b, left - right),
        "and": (a & b, left & right),
        "clip": (a.clip(low, high), left & set(range(low, high))),
        "moved": (a.moved(1000).moved(-990), {n + 10 for n in left}),
        "whole": (a.whole(4), {n for n in left if set(range(n & ~3, (n & ~3) + 4)) <= left}),
    }
    for name, (found, expected) in results.items():
        assert members(found) == expected, name
        assert canonical(found), name
        assert found.total == len(expected), name
        assert python_set(list(found)) == expected, name
    assert (a == b) == (left == right)
    assert len(a) == len(a.rows()) == len(a.tolist())


@settings(max_examples=200, deadline=None)
@given(BYTES)
def test_bytes_and_pages(pairs: list[tuple[int, int]]) -> None:
    found, here = ByteRanges.of(pairs), python_set(pairs)
    whole = {n // PAGE_SIZE for n in here}
    inside = {n for n in whole if here >= set(range(n * PAGE_SIZE, (n + 1) * PAGE_SIZE))}
    assert members(found.touched_pages()) == whole
    assert members(found.pages()) == inside
    assert canonical(found.pages())
    assert found.pages().bytes().pages() == found.pages()
    assert found.pages().bytes().total == PAGE_SIZE * len(inside)


def test_values_do_not_change_and_keep_their_unit() -> None:
    found = PageRanges([5, 1, 3], [6, 4, 5])
    assert found.tolist() == [[1, 6]]
    with pytest.raises(ValueError, match="read-only"):
        found.start[0] = 0
    with pytest.raises(FrozenInstanceError):
        found.start = found.end  # type: ignore[misc]
    assert found != ByteRanges([1], [6])
    assert {found, PageRanges([1], [6])} == {found}
    with pytest.raises(ValueError, match="shapes"):
        PageRanges([1, 2], [3])


def test_caller_can_still_change_what_it_gave() -> None:
    start = np.array([7], np.uint64)
    found = PageRanges(start, np.array([9], np.uint64))
    start[0] = 1
    assert found.tolist() == [[7, 9]]


def test_a_report_is_merged_once() -> None:
    """The reported pages are merged when they are read, and by nobody after that."""
    rig = Rig()
    merges = []

    def count(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        merges.append(columns)
        return pages.coalesce(*columns)

    with (
        mock.patch("vballoon.memory.ranges.coalesce", side_effect=count),
        mock.patch("vballoon.memory.ranges.native", None),
        mock.patch("vballoon.memory.pages.native", None),
    ):
        rig.send(4, (rig.pages(2048, 256),), (rig.pages(1536, 512),))
    assert len(merges) == 1
    assert rig.balloon.counters.discarded_bytes == 3 << 20
