# SPDX-License-Identifier: Apache-2.0
"""vballoon.skipmap: the map of one guest, its rounds, and what makes them void."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.memory import make_memory, memfd

from vballoon.errors import ProtocolError
from vballoon.memory import GuestMemory, MemoryRegion, PageRanges
from vballoon.skipmap import VOIDS, Provenance, Round, RoundKind, SkipMap, VoidReason
from vballoon_spec.skipmap import LIVE_MAGIC, LiveHeader, LiveRoundState

B, R, H, W = Provenance
MIB = 1 << 20


@pytest.fixture
def memory():
    memory = make_memory((0, 4 * MIB), (1 << 32, 2 * MIB))
    yield memory
    for region in memory.regions:
        region.close()


@pytest.fixture
def skipmap(memory):
    skipmap = SkipMap(memory)
    yield skipmap
    skipmap.close()


def u64(*values):
    return np.array(values, dtype=np.uint64)


def put(skipmap, provenance, *ranges):
    return skipmap.set_ranges(provenance, PageRanges.of(ranges))


def test_provenances_do_not_mix(skipmap):
    for i, provenance in enumerate(Provenance):
        put(skipmap, provenance, (10 * i, 10 * i + 5))
    for i, provenance in enumerate(Provenance):
        assert skipmap.extents(provenance).tolist() == [[10 * i, 10 * i + 5]]
    assert skipmap.combined().count() == 20
    assert skipmap.combined(B, W).extents().tolist() == [[0, 5], [30, 35]]


def test_clear_ranges_and_clear(skipmap):
    put(skipmap, B, (0, 100), (1 << 20, (1 << 20) + 7))
    assert skipmap.clear_ranges(B, PageRanges([3], [5])) == 0
    assert skipmap.extents(B).tolist() == [[0, 3], [5, 100], [1 << 20, (1 << 20) + 7]]
    skipmap.clear(B)
    assert skipmap.count(B) == 0


def test_ranges_outside_memory_are_cut_and_counted(skipmap):
    assert put(skipmap, H, (1000, 1100), (5000, 6000), (2, 3)) == 2
    assert skipmap.extents(H).tolist() == [[2, 3], [1000, 1024]]
    assert skipmap.dropped == 2


def test_the_safety_rule_is_and_not(skipmap):
    put(skipmap, H, (0, 64), (1 << 20, (1 << 20) + 10))
    written = skipmap.combined(B)  # empty
    written.set_ranges(PageRanges([5, (1 << 20) + 9], [6, (1 << 20) + 10]))
    skip = skipmap.combined(H).and_not(written)
    assert skip.extents().tolist() == [[0, 5], [6, 64], [1 << 20, (1 << 20) + 9]]
    assert (skipmap.combined(H) & written).count() == 2
    assert skipmap.count(H) == 74, "the live bits are not touched"


def test_reported_is_only_what_is_still_a_hole(skipmap, memory):
    low, high = memory.regions
    put(skipmap, R, (0, 100), (1 << 20, (1 << 20) + 100))
    assert skipmap.valid_now(Provenance.REPORTED).count() == 200
    low.view[7 * 4096 + 13] = 1  # the guest takes page 7 back
    high.view[50 * 4096] = 1
    assert skipmap.valid_now(Provenance.REPORTED).extents().tolist() == [
        [0, 7],
        [8, 100],
        [1 << 20, (1 << 20) + 50],
        [(1 << 20) + 51, (1 << 20) + 100],
    ]
    assert skipmap.count(R) == 200


def test_memory_without_a_file_counts_as_data():
    region = MemoryRegion(guest_phys_addr=0, size=MIB)
    skipmap = SkipMap(GuestMemory([region]))
    put(skipmap, R, (0, 10))
    assert skipmap.valid_now(Provenance.REPORTED).count() == 0
    skipmap.close()


# rounds


def begun(skipmap, kind=RoundKind.HINT, number=7):
    round_ = Round(id=number, kind=kind)
    skipmap.begin_round(round_)
    return round_


def header(skipmap):
    fd = skipmap.open_fd()
    try:
        return LiveHeader.parse(os.pread(fd, LiveHeader.SIZE, 0))
    finally:
        os.close(fd)


def test_a_round_starts_empty_and_ends_complete(skipmap):
    put(skipmap, H, (0, 5))
    put(skipmap, W, (0, 5))
    round_ = begun(skipmap)
    assert skipmap.count(H) == 0
    assert skipmap.count(W) == 5
    assert round_.state is LiveRoundState.RUNNING
    round_.record(2, 2048)
    round_.end()
    assert round_.state is LiveRoundState.COMPLETE
    shown = round_.as_dict()
    assert shown["complete"] is True
    assert shown["records"] == 2
    assert shown["published"]["monotonic-ns"] <= shown["first-record"]["monotonic-ns"]
    assert shown["last-record"]["monotonic-ns"] <= shown["ended"]["monotonic-ns"]
    assert header(skipmap).hint_round == 7
    assert header(skipmap).hint_state == LiveRoundState.COMPLETE


@pytest.mark.parametrize("spoil", ["bad records", "stopped early", "said so"])
def test_a_round_that_lost_something_is_not_complete(skipmap, spoil):
    round_ = begun(skipmap)
    if spoil == "bad records":
        round_.record(1, 1, bad=1)
    elif spoil == "said so":
        round_.spoil("a short buffer")
    round_.end(complete=spoil != "stopped early")
    assert round_.state is LiveRoundState.INCOMPLETE
    assert round_.as_dict()["complete"] is False


@pytest.mark.parametrize("reason", VoidReason)
def test_what_survives_what(skipmap, reason):
    """The sentences of the safety contract, independent of the table that implements them."""
    round_ = begun(skipmap)
    round_.end()
    for provenance in Provenance:
        put(skipmap, provenance, (0, 10))
    before = header(skipmap).generation
    skipmap.void(reason)
    left = {p for p in Provenance if skipmap.count(p)}
    assert H not in left, "hinted bits are hearsay"
    assert W not in left, "walked bits are hearsay"
    gone = reason in (VoidReason.FRONTEND_LOST, VoidReason.BACKEND_RESTARTED)
    assert (R in left) == (not gone), "a hole stays a hole, in the same file"
    assert (B in left) == (reason is VoidReason.MEMORY_CHANGED)
    assert round_.state is LiveRoundState.VOID
    assert round_.void_reason == str(reason)
    assert not round_.as_dict()["complete"]
    assert header(skipmap).generation > before
    assert set(VOIDS) == set(VoidReason)


def test_voiding_a_round_clears_its_bits_only(skipmap):
    hint, walk = begun(skipmap), begun(skipmap, RoundKind.WALK, 9)
    put(skipmap, H, (0, 10))
    put(skipmap, W, (0, 10))
    hint.void("stopped by the operator")
    hint.void("a later reason")
    hint.end()
    assert hint.void_reason == "stopped by the operator"
    assert hint.state is LiveRoundState.VOID
    assert (skipmap.count(H), skipmap.count(W)) == (0, 10)
    walk.end()
    assert header(skipmap).walk_state == LiveRoundState.COMPLETE
    assert header(skipmap).hint_state == LiveRoundState.VOID


def test_an_old_round_cannot_void_the_bits_of_a_new_one(skipmap):
    old, new = begun(skipmap, number=2), begun(skipmap, number=3)
    put(skipmap, H, (0, 10))
    assert old.state is LiveRoundState.VOID
    old.end()
    old.void("late")
    assert skipmap.count(H) == 10
    assert new.state is LiveRoundState.RUNNING
    assert header(skipmap).hint_round == 3


# another memory table


def test_rebuilt_keeps_ballooned_of_memory_that_stays(memory):
    old = SkipMap(memory)
    begun(old).end()
    for provenance in Provenance:
        put(old, provenance, (1000, 1024), (1 << 20, (1 << 20) + 5))
    low, high = memory.regions
    plugged = MemoryRegion.map(guest_phys_addr=4 * MIB, size=MIB, file_offset=0, fd=memfd(MIB))
    again = MemoryRegion.map(  # the same memory through another descriptor
        guest_phys_addr=low.guest_phys_addr, size=low.size, file_offset=0, fd=os.dup(low.fd)
    )
    moved = MemoryRegion.map(
        guest_phys_addr=1 << 33, size=high.size, file_offset=high.file_offset, fd=os.dup(high.fd)
    )
    new = old.rebuilt(GuestMemory([again, plugged, moved]))
    assert old.count(B) == 0
    assert new.extents(B).tolist() == [[1000, 1024]]
    assert new.extents(R).tolist() == [[1000, 1024]]
    assert new.count(H) == new.count(W) == 0
    assert new.rounds[RoundKind.HINT].void_reason == str(VoidReason.MEMORY_CHANGED)
    new.close()
    for region in (plugged, again, moved):
        region.close()


def test_other_memory_at_the_same_place_keeps_nothing(memory):
    old = SkipMap(memory)
    put(old, B, (0, 10))
    low = memory.regions[0]
    other = MemoryRegion.map(guest_phys_addr=0, size=low.size, file_offset=0, fd=memfd(low.size))
    new = old.rebuilt(GuestMemory([other]))
    assert new.count(B) == 0
    new.close()
    other.close()


# the descriptor


def test_the_descriptor_shows_the_live_bits_and_cannot_be_written(skipmap):
    fd = skipmap.open_fd()
    layout = skipmap.descriptor_layout()
    assert os.fstat(fd).st_size == layout["size"]
    view = mmap.mmap(fd, layout["size"], prot=mmap.PROT_READ)
    assert view[:8] == LIVE_MAGIC
    put(skipmap, H, ((1 << 20) + 1, (1 << 20) + 3))
    (entry,) = [
        e
        for e in layout["bitmaps"]
        if e["provenance"] == "hinted" and e["guest-phys-addr"] == 1 << 32
    ]
    at, length = entry["offset"], entry["length"]
    assert length == 2 * MIB // 4096 // 8
    assert view[at : at + length] == b"\x06" + bytes(length - 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"x")
    with pytest.raises((PermissionError, ValueError)):
        mmap.mmap(fd, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(OSError, match=r"not permitted|denied"):  # nor cut it from under us
        os.truncate(f"/proc/self/fd/{fd}", 0)
    skipmap.close()
    assert LiveHeader.parse(view[: LiveHeader.SIZE]).live == 0
    assert view[at : at + length] == bytes(length), "the map of a dead guest is empty"
    view.close()
    os.close(fd)


def test_no_descriptor_is_left_behind(memory):
    before = set(os.listdir("/proc/self/fd"))
    skipmap = SkipMap(memory)
    os.close(skipmap.open_fd())
    skipmap.close()
    skipmap.close()
    del skipmap
    assert set(os.listdir("/proc/self/fd")) == before


class HugeGuest:
    """A memory table without mappings."""

    def __init__(self, size):
        self.regions = (MemoryRegion(guest_phys_addr=0, size=size),)


def test_16_tib_take_no_memory_before_the_first_bit(memory):
    import time

    began = time.perf_counter()
    skipmap = SkipMap(HugeGuest(16 << 40))
    put(skipmap, H, (1 << 31, (1 << 31) + 1024))
    assert skipmap.count(H) == 1024
    assert skipmap.extents(H).tolist() == [[1 << 31, (1 << 31) + 1024]]
    assert skipmap.combined().count() == 1024
    assert time.perf_counter() - began < 1
    fd = skipmap.open_fd()
    assert os.fstat(fd).st_blocks * 512 <= 3 * 4096
    os.close(fd)
    skipmap.close()


few_ranges = st.lists(
    st.tuples(
        st.sampled_from([0, 511 * 64, 512 * 64, 1 << 21, (1 << 21) - 40, 5 << 21]),
        st.integers(0, 3000),
        st.integers(1, 3000),
    ),
    max_size=4,
)


@given(st.fixed_dictionaries(dict.fromkeys(Provenance, few_ranges)))
@settings(max_examples=60, deadline=None)
def test_combining_is_what_sets_do(ranges):
    """Over 64 GiB, so that bitmaps are combined in several pieces and lie in separate spans."""
    skipmap = SkipMap(HugeGuest(64 << 30))
    sets = {}
    for provenance, each in ranges.items():
        pairs = [(at + start, at + start + length) for at, start, length in each]
        sets[provenance] = {page for a, b in pairs for page in range(a, b)}
        if pairs:
            put(skipmap, provenance, *pairs)

    def pages(bitmap):
        found = {page for a, b in bitmap.extents().tolist() for page in range(a, b)}
        assert bitmap.count() == len(found)
        return found

    hinted, walked = skipmap.bitmap(H), skipmap.bitmap(W)
    assert pages(skipmap.combined()) == set().union(*sets.values())
    assert pages(hinted | walked) == sets[H] | sets[W]
    assert pages(hinted & walked) == sets[H] & sets[W]
    assert pages(hinted.and_not(walked)) == sets[H] - sets[W]
    assert pages(walked.copy()) == sets[W]
    again = skipmap.combined(B, R)
    assert pages(skipmap.combined(H, W, into=again)) == sets[H] | sets[W]
    skipmap.close()


def test_more_memory_than_can_be_mapped_is_the_front_end_s_fault():
    with pytest.raises(ProtocolError, match="memory-too-large"):
        SkipMap(HugeGuest((1 << 64) - (1 << 20)))
