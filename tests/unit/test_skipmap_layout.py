# SPDX-License-Identifier: Apache-2.0
"""vballoon.skipmap.layout: every page has its bit, and nothing else has one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vballoon.memory import PageRanges
from vballoon.skipmap import BitmapLayout, PageBitmap


def region(first_pfn, pages, file_offset=0):
    return SimpleNamespace(
        guest_phys_addr=first_pfn << 12, size=pages << 12, file_offset=file_offset
    )


def u64(*values):
    return np.array(values, dtype=np.uint64)


@st.composite
def tables(draw):
    """Up to four regions with gaps or without, from page 0 to past 4 GiB."""
    at, regions = draw(st.sampled_from([0, 1, 192, 1 << 20])), []
    for _ in range(draw(st.integers(1, 4))):
        pages = draw(st.integers(1, 3000))
        regions.append(region(at, pages))
        at += pages + draw(st.sampled_from([0, 0, 1, 63, 4096]))
    return regions


@given(tables(), st.data())
@settings(max_examples=200, deadline=None)
def test_set_clip_and_list_agree_with_a_set(regions, data):
    memory = {
        p
        for r in regions
        for p in range(r.guest_phys_addr >> 12, (r.guest_phys_addr + r.size) >> 12)
    }
    top = max(memory) + 100
    pairs = data.draw(st.lists(st.tuples(st.integers(0, top), st.integers(0, top)), max_size=20))
    bitmap = PageBitmap(BitmapLayout(regions))
    start, end = u64(*[p[0] for p in pairs]), u64(*[p[1] for p in pairs])
    clipped = bitmap._fill(start, end, True)
    asked = [set(range(a, b)) for a, b in pairs]
    expected = set().union(*asked) & memory
    assert {p for a, b in bitmap.extents().tolist() for p in range(a, b)} == expected
    assert bitmap.count() == len(expected)
    assert clipped == sum(
        a > b or not pages <= memory for (a, b), pages in zip(pairs, asked, strict=True)
    )


def test_bit_0_is_the_first_page_of_the_region():
    regions = [region(0, 160), region(192, 1000), region(1 << 20, 130)]
    layout = BitmapLayout(regions)
    for index, r in enumerate(regions):
        bitmap = PageBitmap(layout)
        first = r.guest_phys_addr >> 12
        bitmap.set_ranges(PageRanges([first], [first + 1]))
        assert int(bitmap.region(index)[0]) == 1
        assert bitmap.region(index).size == -(-(r.size >> 12) // 64)
        assert sum(int(bitmap.region(i).sum()) for i in range(3)) == 1


def test_aligned_blocks_stay_aligned_in_every_region():
    layout = BitmapLayout([region(0, 160), region(192, 20000), region(1 << 20, 5000)])
    for r in layout.regions:
        assert (r.first_word - r.first_pfn // 64) % 512 == 0
    assert layout.words % 512 == 0


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (2**64 - 1, 0),  # num wrapped
        (2**52, 2**64 - 1),
        (0, 2**64 - 1),
        (5, 4),
        (2**63, 2**63 + 5),
    ],
)
def test_numbers_that_wrap_or_are_no_memory_are_cut_and_counted(start, end):
    bitmap = PageBitmap(BitmapLayout([region(64, 64), region(1000, 7)]))
    assert bitmap._fill(u64(start), u64(end), True) == 1
    assert bitmap.count() == (71 if (start, end) == (0, 2**64 - 1) else 0)


def test_no_memory_at_all():
    bitmap = PageBitmap(BitmapLayout([]))
    assert bitmap.set_ranges(PageRanges([0], [10])) == 1
    assert bitmap.count() == 0
    assert not len(bitmap.extents())


def test_a_partial_page_at_the_end_has_no_bit():
    odd = SimpleNamespace(guest_phys_addr=0, size=3 * 4096 + 100, file_offset=0)
    bitmap = PageBitmap(BitmapLayout([odd]))
    assert bitmap.layout.pages == 3
    assert bitmap.set_ranges(PageRanges([0], [4])) == 1
    assert bitmap.extents().tolist() == [[0, 3]]
