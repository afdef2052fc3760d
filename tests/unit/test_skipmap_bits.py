# SPDX-License-Identifier: Apache-2.0
"""vballoon.skipmap.bits against sets of integers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vballoon.skipmap import bits

WORDS = 1024 * 3
BITS = WORDS * 64


def arrays(ranges):
    pairs = np.array(ranges, dtype=np.uint64).reshape(-1, 2)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def naive(ranges):
    return {bit for start, end in ranges for bit in range(start, end)}


def set_bits(words):
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


@st.composite
def any_range(draw):
    """Mostly what guests send (aligned blocks), some ragged, some long, many in the same words."""
    if draw(st.booleans()):
        order = draw(st.integers(0, 13))
        block = draw(st.integers(0, (BITS >> order) - 1))
        return block << order, (block + 1) << order
    near = draw(st.sampled_from([0, 64 * 7, BITS // 2, BITS - 300]))
    start = near + draw(st.integers(0, 200))
    length = draw(st.one_of(st.integers(1, 70), st.integers(1, BITS)))
    return start, min(start + length, BITS)


many_ranges = st.lists(any_range(), min_size=0, max_size=40)


@given(many_ranges, many_ranges)
@settings(max_examples=300, deadline=None)
def test_fill_is_what_a_set_does(to_set, to_clear):
    words = np.zeros(WORDS, dtype=np.uint64)
    bits.fill(words, *arrays(to_set), True)
    assert set_bits(words) == naive(to_set)
    bits.fill(words, *arrays(to_clear), False)
    left = naive(to_set) - naive(to_clear)
    assert set_bits(words) == left
    assert bits.count(words) == len(left)


@given(many_ranges)
@settings(max_examples=200, deadline=None)
def test_extents_are_the_runs_of_the_set(ranges):
    words = np.zeros(WORDS, dtype=np.uint64)
    bits.fill(words, *arrays(ranges), True)
    runs = bits.extents(words).tolist()
    assert naive(runs) == naive(ranges)
    assert all(start < end for start, end in runs)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(runs)), "runs must not touch"


@pytest.mark.parametrize("value", [True, False], ids=["set", "clear"])
def test_every_bit_of_one_word_at_once_backwards(value):
    """The worst case of several entries for one word: 64 in it, none of them the whole word."""
    words = np.full(64, 0 if value else 2**64 - 1, dtype=np.uint64)
    start = np.arange(128 + 63, 127, -1).astype(np.uint64)
    bits.fill(words, start, start + np.uint64(1), value)
    assert int(words[2]) == (2**64 - 1 if value else 0)
    assert bits.count(words) == (64 if value else 63 * 64)


def test_a_flood_of_huge_ranges_costs_one_pass():
    """1000 ranges over the whole map are one: otherwise a guest could buy hours with a page."""
    import time

    words = np.zeros(1 << 20, dtype=np.uint64)
    start = np.zeros(1000, dtype=np.uint64)
    end = np.full(1000, words.size * 64, dtype=np.uint64)
    bits.fill(words, start, end, True)
    began = time.perf_counter()
    words[:] = 2**64 - 1
    once = time.perf_counter() - began
    began = time.perf_counter()
    bits.fill(words, start, end, True)
    assert time.perf_counter() - began < 50 * once + 0.01
    assert bits.count(words) == words.size * 64


@pytest.mark.parametrize("size", [0, 1, bits.COUNT_CHUNK - 1, bits.COUNT_CHUNK, 70_001])
def test_count_of_full_and_random_words(size):
    full = np.full(size, 2**64 - 1, dtype=np.uint64)
    assert bits.count(full) == 64 * size
    some = np.random.default_rng(7).integers(0, 2**63, size).astype(np.uint64)
    assert bits.count(some) == sum(int(w).bit_count() for w in some.tolist())


def test_extents_across_the_scanner_s_pieces():
    words = np.zeros(2 * bits.SCAN_CHUNK + 5, dtype=np.uint64)
    edge = bits.SCAN_CHUNK * 64
    ranges = [
        (edge - 3, edge + 3),
        (2 * edge - 64, 2 * edge),
        (words.size * 64 - 1, words.size * 64),
    ]
    bits.fill(words, *arrays(ranges), True)
    assert [tuple(r) for r in bits.extents(words).tolist()] == ranges
