# SPDX-License-Identifier: Apache-2.0
"""Inflate, deflate, reporting, hinting, statistics: a driver's buffers and their effects."""

from __future__ import annotations

import numpy as np
import pytest
from tests.fakes.driver import Element
from tests.fakes.memory import make_memory
from tests.fakes.rig import MIB, Rig

from vballoon.balloon.device import ALL_FEATURES
from vballoon.balloon.inflate import PFNS_PER_BUFFER_MAX
from vballoon.balloon.stats import STATS_BYTES_MAX
from vballoon.skipmap import Provenance
from virtio_formats.virtio.balloon import BalloonFeature, BalloonStat, StatTag

INFLATE, DEFLATE, STATS, HINT, REPORT = range(5)
FIRST = 4096  # a page number after the rig's ring space


@pytest.fixture(params=["scalar", "batch"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(engine=request.param)


def set_pages(rig: Rig, provenance: Provenance) -> list[int]:
    runs = rig.balloon.skipmap.extents(provenance).tolist()
    return [pfn for start, end in runs for pfn in range(start, end)]


class TestInflate:
    def test_pages_are_discarded_recorded_and_given_back(self, rig: Rig) -> None:
        rig.fill(FIRST, 4)
        assert len(rig.send(INFLATE, rig.pfns(FIRST, FIRST + 1, FIRST + 3))) == 1
        assert [rig.content(FIRST + i) for i in range(4)] == [0, 0, 0x5A, 0]
        assert set_pages(rig, Provenance.BALLOONED) == [FIRST, FIRST + 1, FIRST + 3]

    def test_deflate_clears_before_the_driver_gets_its_buffer(self, rig: Rig) -> None:
        rig.send(INFLATE, rig.pfns(*range(FIRST, FIRST + 8)))
        assert len(rig.send(DEFLATE, rig.pfns(FIRST + 2, FIRST + 5))) == 1
        assert set_pages(rig, Provenance.BALLOONED) == [FIRST + i for i in (0, 1, 3, 4, 6, 7)]

    def test_page_numbers_outside_memory_are_counted_and_ignored(self, rig: Rig) -> None:
        """Also those that would wrap in 32 bits, or in signed arithmetic."""
        bad = [64 * MIB >> 12, 0xFFFF_FFFF, 0x8000_0000, 1 << 20]
        rig.fill(FIRST)
        assert len(rig.send(INFLATE, rig.pfns(FIRST, *bad))) == 1
        assert set_pages(rig, Provenance.BALLOONED) == [FIRST]
        assert rig.balloon.counters.bad_inflate == len(bad)
        assert not rig.broken

    def test_a_number_across_two_descriptors_and_surplus_bytes(self, rig: Rig) -> None:
        data = np.array([FIRST, FIRST + 1], "<u4").tobytes()
        assert len(rig.send(INFLATE, (rig.bytes(data[:6]), rig.bytes(data[6:] + b"x")))) == 1
        assert set_pages(rig, Provenance.BALLOONED) == [FIRST, FIRST + 1]
        assert rig.balloon.counters.bad_inflate == 1

    def test_all_descriptors_of_a_chain_count(self, rig: Rig) -> None:
        chain = tuple(rig.pfns(FIRST + i)[0] for i in range(5))
        rig.send(INFLATE, chain, rig.pfns(FIRST + 9))
        assert set_pages(rig, Provenance.BALLOONED) == [*range(FIRST, FIRST + 5), FIRST + 9]

    def test_an_endless_buffer_costs_no_more_than_the_limit(self, rig: Rig) -> None:
        many = 16 * MIB
        rig.memory.window(8 * MIB, many)[:] = 0xFF  # page numbers, none of them memory
        assert len(rig.send(INFLATE, (Element(8 * MIB, many),))) == 1
        assert rig.balloon.counters.bad_inflate == many // 4
        assert many // 4 > PFNS_PER_BUFFER_MAX

    def test_writable_part_is_left_alone(self, rig: Rig) -> None:
        rig.fill(FIRST)
        rig.send(INFLATE, (rig.pfns(FIRST + 1)[0], rig.pages(FIRST)))
        assert rig.content(FIRST) == 0x5A
        assert set_pages(rig, Provenance.BALLOONED) == [FIRST + 1]

    @pytest.mark.parametrize("discard", [True, False])
    def test_without_must_tell_host_pages_count_as_reported(self, discard: bool) -> None:
        """Without MUST_TELL_HOST a page may be in use again before its deflation is announced."""
        features = int(ALL_FEATURES & ~BalloonFeature.MUST_TELL_HOST)
        rig = Rig(features=features, discard=discard)
        rig.fill(FIRST, 2)
        rig.send(INFLATE, rig.pfns(FIRST, FIRST + 1))
        rig.fill(FIRST + 1)  # used again, not deflated
        assert set_pages(rig, Provenance.BALLOONED) == []
        skipped = rig.balloon.skipmap.valid_now(Provenance.REPORTED).extents().tolist()
        assert skipped == ([[FIRST, FIRST + 1]] if discard else [])

    def test_no_discard_records_and_leaves_the_memory(self) -> None:
        rig = Rig(discard=False)
        rig.fill(FIRST)
        rig.send(INFLATE, rig.pfns(FIRST))
        assert rig.content(FIRST) == 0x5A
        assert set_pages(rig, Provenance.BALLOONED) == [FIRST]


class TestReporting:
    def test_discard_comes_before_the_acknowledgement(self, rig: Rig) -> None:
        seen: list[tuple[int, int]] = []
        queue = rig.queues[REPORT]
        give = queue.give
        queue.give = lambda ids, written=0: (  # type: ignore[method-assign]
            seen.append((rig.content(FIRST), rig.content(FIRST + 512))),
            give(ids, written),
        )[1]
        rig.fill(FIRST, 1024)
        rig.send(REPORT, (rig.pages(FIRST, 512), rig.pages(FIRST + 512, 512)))
        assert seen == [(0, 0)]
        assert len(set_pages(rig, Provenance.REPORTED)) == 1024

    def test_poison_keeps_the_pages(self, rig: Rig) -> None:
        """MUST NOT modify to a value other than poison_val (Free Page Reporting)."""
        rig = Rig(engine=rig.engine)
        rig.balloon.reset()
        rig.balloon.write_config(12, (0xAA).to_bytes(4, "little"))
        rig.set_up((0, 1, 2, 3, 4, 5))
        rig.fill(FIRST, 512, 0xAA)
        assert len(rig.send(REPORT, (rig.pages(FIRST, 512),))) == 1
        assert rig.content(FIRST) == 0xAA
        assert set_pages(rig, Provenance.REPORTED) == []

    def test_poison_of_zero_is_what_a_hole_reads_as(self, rig: Rig) -> None:
        rig.fill(FIRST, 512)
        rig.send(REPORT, (rig.pages(FIRST, 512),))
        assert rig.content(FIRST) == 0

    def test_only_whole_pages_are_discarded(self, rig: Rig) -> None:
        rig.fill(FIRST, 3)
        rig.send(REPORT, (Element((FIRST << 12) + 100, 2 * 4096, True),))
        assert [rig.content(FIRST + i) for i in range(3)] == [0x5A, 0, 0x5A]
        assert set_pages(rig, Provenance.REPORTED) == [FIRST + 1]
        assert rig.balloon.counters.bad_report == 1

    def test_report_outside_memory_stops_that_queue_only(self, rig: Rig) -> None:
        rig.send(REPORT, (rig.pages((64 * MIB >> 12) - 1, 2),))
        assert rig.broken[REPORT].rule == "desc-address"
        assert len(rig.send(INFLATE, rig.pfns(FIRST))) == 1

    def test_a_page_touched_again_is_data_again(self, rig: Rig) -> None:
        rig.fill(FIRST, 512)
        rig.send(REPORT, (rig.pages(FIRST, 512),))
        rig.fill(FIRST + 7)
        runs = rig.balloon.skipmap.valid_now(Provenance.REPORTED).extents().tolist()
        assert runs == [[FIRST, FIRST + 7], [FIRST + 8, FIRST + 512]]


def command(rig: Rig, cmd_id: int) -> tuple[Element]:
    return (rig.bytes(cmd_id.to_bytes(4, "little")),)


class TestHinting:
    def test_a_round(self, rig: Rig) -> None:
        round_id = rig.balloon.start_hinting()
        assert rig.balloon.read_config()[8:12] == round_id.to_bytes(4, "little")
        assert rig.config_changes == 1
        rig.fill(FIRST, 1024)
        back = rig.send(
            HINT,
            command(rig, round_id),
            (rig.pages(FIRST, 1024),),
            (rig.pages(FIRST + 2048, 16),),
            command(rig, 0),
        )
        assert len(back) == 4
        assert rig.content(FIRST) == 0x5A  # recorded, never discarded
        assert len(set_pages(rig, Provenance.HINTED)) == 1040
        done = rig.event("ROUND_COMPLETED")
        assert (done["round"], done["complete"]) == (round_id, True)
        assert rig.balloon.read_config()[8:12] == (1).to_bytes(4, "little")  # DONE: pages go back

    def test_pages_under_another_id_are_ignored(self, rig: Rig) -> None:
        round_id = rig.balloon.start_hinting()
        rig.send(HINT, (rig.pages(FIRST),), command(rig, round_id + 1), (rig.pages(FIRST + 1),))
        assert set_pages(rig, Provenance.HINTED) == []
        assert rig.balloon.counters.hints_stale_pages == 2

    def test_a_repeated_id_does_not_reopen_the_round(self, rig: Rig) -> None:
        round_id = rig.balloon.start_hinting()
        rig.send(HINT, command(rig, round_id), command(rig, 0))
        rig.send(HINT, command(rig, round_id), (rig.pages(FIRST),))
        assert set_pages(rig, Provenance.HINTED) == []

    def test_an_id_is_not_reused_before_stop(self, rig: Rig) -> None:
        """MUST NOT reuse a command ID until it has received STOP (Free Page Hinting)."""
        first = rig.balloon.start_hinting()
        rig.balloon.hints.next_id = first
        assert rig.balloon.start_hinting() != first
        rig.send(HINT, command(rig, 0))
        rig.balloon.hints.next_id = first
        assert rig.balloon.start_hinting() == first

    def test_ids_skip_the_reserved_ones_when_they_wrap(self, rig: Rig) -> None:
        rig.balloon.hints.next_id = 0xFFFF_FFFF
        assert [rig.balloon.start_hinting() for _ in range(2)] == [0xFFFF_FFFF, 2]

    @pytest.mark.parametrize("size", [0, 1, 3, 5, 4096])
    def test_a_command_of_another_size_spoils_the_round(self, rig: Rig, size: int) -> None:
        round_id = rig.balloon.start_hinting()
        bad = (rig.bytes(bytes(size)),) if size else (Element(FIRST << 12, 0),)
        rig.send(HINT, command(rig, round_id), bad, (rig.pages(FIRST),), command(rig, 0))
        assert rig.event("ROUND_COMPLETED")["complete"] is (size == 0)
        assert len(set_pages(rig, Provenance.HINTED)) == (size == 0)

    def test_a_new_round_voids_the_old_one(self, rig: Rig) -> None:
        first = rig.balloon.start_hinting()
        rig.send(HINT, command(rig, first), (rig.pages(FIRST, 8),))
        second = rig.balloon.start_hinting()
        assert rig.event("ROUND_COMPLETED")["round"] == first
        assert set_pages(rig, Provenance.HINTED) == []
        rig.send(HINT, (rig.pages(FIRST, 8),), command(rig, second), (rig.pages(FIRST + 9),))
        assert set_pages(rig, Provenance.HINTED) == [FIRST + 9]

    @pytest.mark.parametrize("happening", ["reset", "memory_changed", "detach"])
    def test_what_voids_a_round(self, rig: Rig, happening: str) -> None:
        round_id = rig.balloon.start_hinting()
        rig.send(HINT, command(rig, round_id), (rig.pages(FIRST, 8),))
        getattr(rig.balloon, happening)()
        done = rig.event("ROUND_COMPLETED")
        assert (done["round"], done["complete"]) == (round_id, False)
        assert done["void-reason"]
        assert set_pages(rig, Provenance.HINTED) == []

    @pytest.mark.parametrize("ended", [True, False])
    def test_the_pages_of_a_void_round_go_back_to_the_guest(self, rig: Rig, ended: bool) -> None:
        """A driver keeps hinted pages until the command id is DONE."""
        round_id = rig.balloon.start_hinting(hold=True)
        rig.send(HINT, command(rig, round_id), (rig.pages(FIRST, 8),))
        if ended:
            rig.send(HINT, command(rig, 0))
        before = rig.config_changes
        rig.balloon.memory_changed()
        assert rig.balloon.read_config()[8:12] == (1).to_bytes(4, "little")
        assert rig.config_changes == before + 1
        rig.balloon.memory_changed()
        assert rig.config_changes == before + 1
        rig.balloon.start_hinting()
        rig.balloon.detach()
        rig.balloon.attach(rig)
        assert rig.balloon.read_config()[8:12] == (1).to_bytes(4, "little")

    def test_hold_keeps_the_pages_until_stop(self, rig: Rig) -> None:
        round_id = rig.balloon.start_hinting(hold=True)
        rig.send(HINT, command(rig, round_id), (rig.pages(FIRST),), command(rig, 0))
        assert rig.balloon.read_config()[8:12] == round_id.to_bytes(4, "little")
        rig.balloon.stop_hinting()
        assert rig.balloon.read_config()[8:12] == (1).to_bytes(4, "little")
        assert set_pages(rig, Provenance.HINTED) == [FIRST]


def stats_buffer(rig: Rig, **values: int) -> tuple[Element]:
    entries = [BalloonStat(tag=StatTag[name], val=val).build() for name, val in values.items()]
    return (rig.bytes(b"".join(entries)),)


class TestStats:
    def test_the_buffer_is_kept_until_the_next_request(self, rig: Rig) -> None:
        assert rig.send(STATS, stats_buffer(rig, MEMFREE=5, MEMTOT=9)) == []
        assert rig.balloon.stats().values == {StatTag.MEMFREE: 5, StatTag.MEMTOT: 9}
        assert rig.balloon.request_stats()
        assert len(rig.drivers[STATS].collect()) == 1
        assert not rig.balloon.request_stats()

    def test_unknown_tags_are_ignored(self, rig: Rig) -> None:
        unknown = BalloonStat(tag=4711, val=1).build() + BalloonStat(tag=15, val=7).build()
        rig.send(STATS, (rig.bytes(unknown),))
        assert rig.balloon.stats().values == {StatTag.DIRECT_RECLAIM: 7}

    def test_a_second_buffer_sends_the_first_one_back(self, rig: Rig) -> None:
        back = rig.send(STATS, stats_buffer(rig, AVAIL=1), stats_buffer(rig, AVAIL=2))
        assert len(back) == 1
        assert rig.balloon.stats().values == {StatTag.AVAIL: 2}
        assert len(rig.send(STATS, stats_buffer(rig, AVAIL=3))) == 1

    @pytest.mark.parametrize("size", [0, 9, 11, 4 * MIB])
    def test_odd_and_huge_buffers(self, rig: Rig, size: int) -> None:
        rig.send(STATS, (Element(8 * MIB, size),))
        assert rig.balloon.counters.stats_buffers == 1
        assert rig.balloon.counters.stats_unknown_tags <= STATS_BYTES_MAX // 10
        assert not rig.broken

    def test_stop_and_reset_give_the_buffer_back(self, rig: Rig) -> None:
        rig.send(STATS, stats_buffer(rig, AVAIL=1))
        rig.balloon.stop()
        rig.balloon.reset()
        assert len(rig.drivers[STATS].collect()) == 1
        assert rig.balloon.stats().values == {}


def test_a_ring_without_a_role_is_stopped() -> None:
    rig = Rig(features=int(BalloonFeature.STATS_VQ), present=(0, 1, 2, 5))
    rig.send(5, rig.pfns(FIRST))
    assert rig.broken[5].rule == "queue-without-role"
    assert len(rig.send(INFLATE, rig.pfns(FIRST))) == 1


def test_inflate_in_the_second_region() -> None:
    rig = Rig(memory=make_memory((0, 16 * MIB), (1 << 32, 16 * MIB)))
    pfn = (1 << 32) >> 12
    rig.fill(pfn, 2)
    rig.send(INFLATE, rig.pfns(pfn, pfn + 1, FIRST))
    assert rig.content(pfn) == rig.content(pfn + 1) == 0
    assert rig.balloon.counters.bad_inflate == 1  # FIRST is 16 MiB: past the first region's end
    assert set_pages(rig, Provenance.BALLOONED) == [pfn, pfn + 1]
