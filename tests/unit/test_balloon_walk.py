# SPDX-License-Identifier: Apache-2.0
"""The walk queue against good drivers and a hostile one."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.driver import Element
from tests.fakes.rig import MIB, Rig

from vballoon.balloon import walking
from vballoon.native import native
from vballoon.skipmap import Provenance
from vballoon_spec.walk.formats import (
    BUFFER_MAX,
    WalkBegin,
    WalkEnd,
    WalkHeader,
    WalkMemmap,
    WalkMemmapRun,
    WalkRange,
    WalkType,
)
from virtio_formats.wire import WireStruct

WALK = 5
FIRST = 4096


@pytest.fixture(params=["scalar", "batch"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(engine=request.param)


def zeros(cls: type[WireStruct], **values: int) -> Any:
    return cls(**(dict.fromkeys(cls.dtype().names or (), 0) | values))


class Walker:
    """A driver that walks; every field of every buffer can be overridden."""

    def __init__(self, rig: Rig, min_order: int = 0) -> None:
        self.rig = rig
        self.round = rig.balloon.start_walk(min_order)
        self.seq = self.ranges = self.pages = self.buffers = 0

    def header(self, kind: int, count: int = 0, **over: int) -> bytes:
        values = {"type": kind, "round": self.round, "seq": self.seq, "num": count} | over
        self.seq += 1
        return WalkHeader(**values).build()

    def begin(self, **over: int) -> bytes:
        self.seq = 0
        body = zeros(WalkBegin, page_shift=12, layout_id=0, **over)
        return self.header(WalkType.BEGIN) + body.build()

    def send_ranges(self, *pairs: tuple[int, int], **over: int) -> bytes:
        records = np.array(pairs, "<u8").tobytes()
        self.ranges += len(pairs)
        self.pages = (self.pages + sum(n for _, n in pairs)) % (1 << 64)
        self.buffers += 1
        return self.header(WalkType.RANGES, len(pairs), **over) + records

    def end(self, **over: int) -> bytes:
        totals = {"ranges": self.ranges, "pages": self.pages, "buffers": self.buffers}
        return self.header(WalkType.END) + zeros(WalkEnd, **(totals | over)).build()

    def send(self, *buffers: bytes) -> list[tuple[int, int]]:
        return self.rig.send(WALK, *((self.rig.bytes(b),) for b in buffers))


def walked(rig: Rig) -> list[list[int]]:
    return rig.balloon.skipmap.extents(Provenance.WALKED).tolist()


def test_a_walk(rig: Rig) -> None:
    rig.fill(FIRST, 1024)
    walker = Walker(rig)
    back = walker.send(
        walker.begin(),
        walker.send_ranges((FIRST, 1024), (FIRST + 2048, 1)),
        walker.send_ranges((FIRST + 4096, 3)),
        walker.end(),
    )
    assert len(back) == 4
    assert walked(rig) == [
        [FIRST, FIRST + 1024],
        [FIRST + 2048, FIRST + 2049],
        [FIRST + 4096, FIRST + 4099],
    ]
    done = rig.event("ROUND_COMPLETED")
    assert (done["round"], done["complete"], done["pages"]) == (walker.round, True, 1028)
    assert rig.content(FIRST) == 0x5A  # never discarded
    assert rig.balloon.read_config()[16:20] == (1).to_bytes(4, "little")


def test_the_order_asked_for_reaches_the_driver(rig: Rig) -> None:
    Walker(rig, min_order=9)
    assert rig.balloon.read_config()[20:24] == (9).to_bytes(4, "little")


END_OF_MEMORY = 64 * MIB >> 12
HOSTILE = {
    "outside": (END_OF_MEMORY, 1),
    "across-the-end": (END_OF_MEMORY - 1, 2),
    "nothing": (FIRST, 0),
    "everything": (FIRST, (1 << 64) - 1),
    "wrapping-sum": ((1 << 64) - 1, 2),
    "wrapping-to-memory": ((1 << 64) - 8, FIRST + 16),
    "wrapping-shift": (1 << 52, 1),
    "huge-number": ((1 << 63) + FIRST, 1),
}


@pytest.mark.parametrize("record", HOSTILE.values(), ids=HOSTILE)
def test_hostile_range_is_dropped_and_the_round_incomplete(
    rig: Rig, record: tuple[int, int]
) -> None:
    walker = Walker(rig)
    walker.send(
        walker.begin(), walker.send_ranges((FIRST, 4), record, (FIRST + 8, 4)), walker.end()
    )
    assert walked(rig) == [[FIRST, FIRST + 4], [FIRST + 8, FIRST + 12]]
    done = rig.event("ROUND_COMPLETED")
    assert (done["complete"], done["bad-records"]) == (False, 1)
    assert not rig.broken


def test_ranges_below_the_order_are_dropped(rig: Rig) -> None:
    walker = Walker(rig, min_order=4)
    walker.send(
        walker.begin(min_order=4), walker.send_ranges((FIRST, 15), (FIRST + 16, 16)), walker.end()
    )
    assert walked(rig) == [[FIRST + 16, FIRST + 32]]


@pytest.mark.parametrize("bad", [(FIRST + 1, 16), (FIRST + 64, 24)], ids=["place", "length"])
def test_ranges_that_are_not_made_of_whole_blocks_are_dropped(
    rig: Rig, bad: tuple[int, int]
) -> None:
    walker = Walker(rig, min_order=4)
    walker.send(walker.begin(min_order=4), walker.send_ranges(bad, (FIRST + 32, 32)), walker.end())
    assert walked(rig) == [[FIRST + 32, FIRST + 64]]
    done = rig.event("ROUND_COMPLETED")
    assert (done["complete"], done["bad-records"]) == (False, 1)


def test_ranges_of_another_round_are_ignored(rig: Rig) -> None:
    walker = Walker(rig)
    walker.send(walker.begin(), walker.send_ranges((FIRST, 4), round=walker.round + 1))
    assert walked(rig) == []
    assert rig.balloon.counters.bad_walk == 1


@pytest.mark.parametrize("first", ["send_ranges", "end"])
def test_nothing_counts_before_begin(rig: Rig, first: str) -> None:
    walker = Walker(rig)
    buffer = walker.send_ranges((FIRST, 4)) if first == "send_ranges" else walker.end()
    walker.send(buffer)
    assert walked(rig) == []
    assert not any(name == "ROUND_COMPLETED" for name, _ in rig.events)


def test_a_second_begin_does_not_start_over(rig: Rig) -> None:
    walker = Walker(rig)
    walker.send(walker.begin(), walker.send_ranges((FIRST, 4)))
    walker.send(walker.begin(), walker.end())
    assert rig.event("ROUND_COMPLETED")["complete"] is False


def test_a_lost_buffer_makes_the_round_incomplete(rig: Rig) -> None:
    walker = Walker(rig)
    lost = walker.begin(), walker.send_ranges((FIRST, 4)), walker.send_ranges((FIRST + 8, 4))
    walker.send(lost[0], lost[2], walker.end())
    assert rig.event("ROUND_COMPLETED")["complete"] is False


@pytest.mark.parametrize("wrong", ["ranges", "pages", "buffers"])
def test_totals_that_do_not_add_up(rig: Rig, wrong: str) -> None:
    walker = Walker(rig)
    walker.send(walker.begin(), walker.send_ranges((FIRST, 4)), walker.end(**{wrong: 99}))
    assert rig.event("ROUND_COMPLETED")["complete"] is False


def test_a_walk_that_stopped_early_is_incomplete(rig: Rig) -> None:
    walker = Walker(rig)
    walker.send(walker.begin(), walker.send_ranges((FIRST, 4)), walker.end(result=4))
    assert rig.event("ROUND_COMPLETED")["complete"] is False


def test_reserved_flags_of_end_are_ignored(rig: Rig) -> None:
    walker = Walker(rig)
    walker.send(walker.begin(), walker.send_ranges((FIRST, 4)))
    end = zeros(WalkEnd, ranges=1, pages=4, buffers=1).build()
    walker.send(walker.header(WalkType.END, flags=0x8000) + end)
    assert rig.event("ROUND_COMPLETED")["complete"] is True


def test_a_walk_that_was_cut_is_incomplete(rig: Rig) -> None:
    walker = Walker(rig)
    walker.send(walker.begin(), walker.send_ranges((FIRST, 4)))
    end = zeros(WalkEnd, ranges=1, pages=4, buffers=1).build()
    walker.send(walker.header(WalkType.END, flags=1) + end)
    assert rig.event("ROUND_COMPLETED")["complete"] is False


def test_the_order_does_not_change_under_a_standing_id(rig: Rig) -> None:
    seen: list[tuple[int, int]] = []
    fields = rig.balloon.config.fields
    rig.config_changed = lambda: seen.append(  # type: ignore[method-assign]
        (fields.free_page_walk_cmd_id, fields.free_page_walk_min_order)
    )
    rig.balloon.start_walk(3)
    rig.balloon.start_walk(9)
    assert seen == [(2, 3), (0, 3), (3, 9)]


def malformed(walker: Walker) -> dict[str, bytes]:
    good = walker.send_ranges((FIRST, 4), (FIRST + 8, 4))
    return {
        "one-byte": b"\1",
        "half-a-header": good[:8],
        "cut-record": good[:-1],
        "surplus": good + b"x",
        "fewer-than-said": good[:-16],
        "no-records": walker.header(WalkType.RANGES, 0),
        "unknown-type": walker.header(77),
        "records-in-begin": walker.header(WalkType.BEGIN, 3) + bytes(40),
        "too-many": walker.header(WalkType.RANGES, 0xFFFF_FFFF),
        "end-without-body": walker.header(WalkType.END),
        "over-the-limit": walker.header(WalkType.RANGES, BUFFER_MAX // 16) + bytes(BUFFER_MAX),
    }


@pytest.mark.parametrize("name", list(malformed(Walker(Rig()))))
def test_malformed_buffers_set_nothing_and_come_back(rig: Rig, name: str) -> None:
    walker = Walker(rig)
    walker.send(walker.begin())
    back = walker.send(malformed(walker)[name])
    assert len(back) == 1
    assert walked(rig) == []
    assert rig.balloon.counters.bad_walk == 1
    walker.seq = 1
    walker.send(walker.end(ranges=0, pages=0, buffers=0))  # all else of the round is in order
    assert rig.event("ROUND_COMPLETED")["complete"] is False
    assert not rig.broken


def test_a_buffer_without_records_among_good_ones_spoils_the_round(rig: Rig) -> None:
    walker = Walker(rig)
    begin = walker.begin()
    buffers = [walker.send_ranges((FIRST + 8 * i, 4)) for i in range(6)]
    buffers.insert(3, walker.header(WalkType.RANGES, 0, seq=4))
    for i in range(4, 7):  # one further
        buffers[i] = (
            WalkHeader(type=2, round=walker.round, seq=i + 1, num=1).build() + buffers[i][16:]
        )
    walker.send(begin, *buffers, walker.end(buffers=7))
    assert rig.event("ROUND_COMPLETED")["complete"] is False


def test_an_endless_buffer_is_read_to_the_limit_only(rig: Rig) -> None:
    Walker(rig)
    tracemalloc.start()
    assert len(rig.send(WALK, (Element(8 * MIB, 48 * MIB),))) == 1
    assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    tracemalloc.stop()


def test_ten_million_ranges_take_no_more_memory_than_the_map() -> None:
    rig = Rig(engine="batch")
    walker = Walker(rig)
    walker.send(walker.begin())
    records = np.tile(np.array([[FIRST, 4], [FIRST + 8, 1]], "<u8"), (2000, 1)).tobytes()
    element = rig.bytes(walker.header(WalkType.RANGES, 4000) + records)
    tracemalloc.start()
    for _ in range(50):  # 50 rings of 50 buffers of 4000 ranges
        rig.send(WALK, *[(element,)] * 50)
    assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    tracemalloc.stop()
    assert walked(rig) == [[FIRST, FIRST + 4], [FIRST + 8, FIRST + 9]]


class TestMemmap:
    def buffers(self, walker: Walker, parts: int = 2, **over: int) -> list[bytes]:
        values = {"layout_id": 1, "nr_buffers": parts, "nr_runs": parts, "size": 64} | over
        body = zeros(WalkMemmap, **values)
        run = zeros(WalkMemmapRun, num=512).build()
        return [
            walker.header(WalkType.MEMMAP, 1, round=0, seq=i) + body.build() + run
            for i in range(parts)
        ]

    def test_the_layout_is_put_together(self, rig: Rig) -> None:
        walker = Walker(rig)
        walker.send(*self.buffers(walker, 3))
        layout = rig.balloon.walk_queue.memmap.layout
        assert layout is not None
        assert (layout.header.size, layout.runs.size, layout.partial) == (64, 3, False)

    def test_a_set_that_breaks_off_leaves_the_one_before(self, rig: Rig) -> None:
        walker = Walker(rig)
        walker.send(*self.buffers(walker, 2))
        before = rig.balloon.walk_queue.memmap.layout
        walker.send(*self.buffers(walker, 3)[:2])
        assert rig.balloon.walk_queue.memmap.layout is before is not None

    def test_another_memory_map_voids_it(self, rig: Rig) -> None:
        walker = Walker(rig)
        walker.send(*self.buffers(walker, 2))
        rig.balloon.memory_changed()
        assert rig.balloon.walk_queue.memmap.layout is None

    @pytest.mark.parametrize("order", [(1,), (0, 0, 1), (0, 2, 1), (1, 0)])
    def test_parts_out_of_order_make_no_layout(self, rig: Rig, order: tuple[int, ...]) -> None:
        walker = Walker(rig)
        parts = self.buffers(walker, 3)
        walker.send(*(parts[i] for i in order))
        assert rig.balloon.walk_queue.memmap.layout is None

    @pytest.mark.parametrize(
        ("nr_buffers", "nr_runs", "run"),
        [(1 << 31, 1 << 20, False), (1 << 31, 0, False), (1 << 31, 1 << 20, True)],
    )
    def test_a_set_that_never_ends_is_not_kept(
        self, rig: Rig, nr_buffers: int, nr_runs: int, run: bool
    ) -> None:
        """Buffers with few runs or none are refused, so that their number costs no memory."""
        walker = Walker(rig)
        body = zeros(WalkMemmap, layout_id=1, nr_buffers=nr_buffers, nr_runs=nr_runs, size=64)
        tail = zeros(WalkMemmapRun, num=512).build() if run else b""
        for seq in range(8):
            header = walker.header(WalkType.MEMMAP, int(run), round=0, seq=seq)
            walker.send(header + body.build() + tail)
        assert rig.balloon.counters.bad_walk == 8
        assert rig.balloon.walk_queue.memmap._parts == []

    def test_more_runs_than_said(self, rig: Rig) -> None:
        walker = Walker(rig)
        walker.send(*self.buffers(walker, 2, witness_pfn=1)[:1], *self.buffers(walker, 2)[1:])
        assert rig.balloon.walk_queue.memmap.layout is None
        assert rig.balloon.counters.bad_walk == 1

    @pytest.mark.parametrize("said", [1, 3])
    def test_runs_that_are_not_as_many_as_said(self, rig: Rig, said: int) -> None:
        walker = Walker(rig)
        walker.send(*self.buffers(walker, 2, nr_runs=said))
        assert rig.balloon.walk_queue.memmap.layout is None
        assert rig.balloon.counters.bad_walk >= 1

    def test_it_belongs_to_one_boot(self, rig: Rig) -> None:
        walker = Walker(rig)
        walker.send(*self.buffers(walker))
        rig.balloon.reset()
        assert rig.balloon.walk_queue.memmap.layout is None


def test_records_are_pairs() -> None:
    assert WalkRange.dtype().itemsize == 16


ODD = st.sampled_from(["", "", "", "", "seq", "round", "type", "num", "short", "record", "end"])


@settings(max_examples=60, deadline=None)
@given(st.lists(ODD, min_size=4, max_size=24))
def test_buffers_together_mean_what_they_mean_alone(oddities: list[str]) -> None:
    """Whatever is odd about one of them: bits, counters and the round's end are the same."""
    seen = []
    for together in (walking.TOGETHER, 1 << 16):
        with mock.patch.object(walking, "TOGETHER", together):
            rig = Rig(engine="batch")
            walker = Walker(rig)
            buffers = [walker.begin(), *_with_oddities(walker, oddities), walker.end()]
            walker.send(*buffers)
            found = rig.balloon.walks.round
            assert found is not None
            seen.append(
                (walked(rig), rig.balloon.counters, found.state, bool(found.spoilt), found.records,
                 found.pages, found.bad_records)
            )  # fmt: skip
    assert seen[0] == seen[1]


def _with_oddities(walker: Walker, oddities: list[str]) -> Iterator[bytes]:
    for i, odd in enumerate(oddities):
        first = FIRST + 64 * i
        match odd:
            case "seq" | "round" | "type" | "num":
                yield walker.send_ranges((first, 3), **{odd: 7})
            case "short":
                yield walker.send_ranges((first, 3))[:-4]
            case "record":
                yield walker.send_ranges((first, 3), (END_OF_MEMORY, 1), (first + 8, 1))
            case "end":
                yield walker.end()
            case _:
                yield walker.send_ranges((first, 2), (first + 4, 1))


def test_a_walk_s_buffers_are_recorded_together() -> None:
    """One pass for a batch of them where the loops are compiled, and else one for each."""
    rig = Rig(engine="batch")
    walker = Walker(rig)
    buffers = [walker.begin(), *(walker.send_ranges((FIRST + 8 * i, 4)) for i in range(20))]
    with mock.patch.object(
        rig.balloon.walk_queue, "_alone", wraps=rig.balloon.walk_queue._alone
    ) as one:
        walker.send(*buffers, walker.end())
    assert one.call_count == (2 if native else 22)
    assert rig.balloon.walk_queue.end is not None
    assert rig.event("ROUND_COMPLETED")["complete"]
