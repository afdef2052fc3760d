# SPDX-License-Identifier: Apache-2.0
"""Features, configuration space, queue roles, the operator's side, state that travels."""

from __future__ import annotations

import itertools

import pytest
from tests.fakes.memory import by_messages, make_memory
from tests.fakes.rig import MIB, Rig

from vballoon.balloon import Balloon, Role, settle_roles
from vballoon.balloon.config import ConfigSpace
from vballoon.balloon.device import ALL_FEATURES
from vballoon.errors import ProtocolError, UsageError
from vballoon.skipmap import Provenance
from vballoon.virtio import device
from vballoon.virtqueue import make_virtqueue
from virtio_formats.virtio.balloon import (
    CMD_ID_DONE,
    BalloonConfig,
    BalloonFeature,
    BalloonStat,
    StatTag,
)

OPTIONAL = (
    (BalloonFeature.STATS_VQ, Role.STATS, 2),
    (BalloonFeature.FREE_PAGE_HINT, Role.HINT, 3),
    (BalloonFeature.PAGE_REPORTING, Role.REPORT, 4),
    (BalloonFeature.FREE_PAGE_WALK, Role.WALK, 5),
)
COMBINATIONS = [chosen for n in range(5) for chosen in itertools.combinations(OPTIONAL, n)]


def words(chosen: tuple[tuple[BalloonFeature, Role, int], ...]) -> str:
    return "+".join(role.value for _, role, _ in chosen) or "none"


class TestRoles:
    @pytest.mark.parametrize("chosen", COMBINATIONS, ids=words)
    def test_linux_numbers_densely(self, chosen: tuple) -> None:  # type: ignore[type-arg]
        features = sum(mask for mask, _, _ in chosen)
        roles = settle_roles(features, range(2 + len(chosen)))
        assert roles == {0: Role.INFLATE, 1: Role.DEFLATE} | {
            2 + i: role for i, (_, role, _) in enumerate(chosen)
        }

    @pytest.mark.parametrize("chosen", COMBINATIONS, ids=words)
    def test_the_standard_numbers_have_gaps(self, chosen: tuple) -> None:  # type: ignore[type-arg]
        features = sum(mask for mask, _, _ in chosen)
        numbers = {number: role for _, role, number in chosen}
        roles = settle_roles(features, {0, 1, *numbers})
        assert {k: v for k, v in roles.items() if k > 1} == numbers

    @pytest.mark.parametrize("chosen", COMBINATIONS, ids=words)
    def test_rings_that_come_one_by_one_are_never_taken_for_others(self, chosen: tuple) -> None:  # type: ignore[type-arg]
        """A hint taken for a report would be discarded."""
        features = sum(mask for mask, _, _ in chosen)
        for numbers in (
            {2 + i: role for i, (_, role, _) in enumerate(chosen)},
            {number: role for _, role, number in chosen},
        ):
            for count in range(len(numbers) + 1):
                roles = settle_roles(features, {0, 1, *sorted(numbers)[:count]})
                for index in sorted(numbers)[:count]:
                    assert roles.get(index, numbers[index]) is numbers[index]

    @pytest.mark.parametrize("only", [2, 3], ids=["dense", "fixed"])
    def test_a_ring_waits_until_its_role_is_known(self, only: int) -> None:
        features = int(BalloonFeature.FREE_PAGE_HINT | BalloonFeature.PAGE_REPORTING)
        rig = Rig(features=features, present=(0, 1, 3))
        rig.fill(4096, 512)
        queue, driver = rig.queues[3], rig.drivers[3]
        driver.add(rig.pages(4096, 512))
        driver.publish()
        assert not rig.balloon.process(queue)
        assert queue.taken == 0
        assert rig.content(4096) == 0x5A
        rig.set_up((0, 1, 2, 3) if only == 2 else (0, 1, 3, 4))
        assert rig.balloon.roles[3] is (Role.REPORT if only == 2 else Role.HINT)
        rig.send(3, (rig.pages(4096, 512),))
        assert rig.content(4096) == (0 if only == 2 else 0x5A)

    def test_roles_that_are_known_stay_while_a_ring_is_reset(self) -> None:
        features = int(BalloonFeature.FREE_PAGE_HINT | BalloonFeature.PAGE_REPORTING)
        rig = Rig(features=features, present=(0, 1, 3, 4))
        del rig.queues[4]
        rig.balloon.start()
        assert rig.balloon.roles[3] is Role.HINT
        rig.balloon.reset()
        rig.set_up((0, 1, 2, 3))
        assert rig.balloon.roles.get(3) is Role.REPORT

    def test_unused_rings_do_not_change_the_numbering(self) -> None:
        """A front-end may set up rings that the driver never asked for."""
        roles = settle_roles(int(BalloonFeature.PAGE_REPORTING), range(6))
        assert roles[2] is Role.REPORT


class TestConfig:
    def test_read_only_fields_stay(self) -> None:
        config = ConfigSpace(walk=True)
        config.fields.num_pages, config.fields.free_page_hint_cmd_id = 7, 9
        echo = BalloonConfig(
            num_pages=1,
            actual=2,
            free_page_hint_cmd_id=3,
            poison_val=4,
            free_page_walk_cmd_id=5,
            free_page_walk_min_order=6,
        )
        assert config.write(0, echo.build())
        assert config.fields == BalloonConfig(
            num_pages=7, actual=2, free_page_hint_cmd_id=9, poison_val=4
        )

    @pytest.mark.parametrize(("walk", "size"), [(True, 24), (False, 16)])
    def test_size(self, walk: bool, size: int) -> None:
        assert len(ConfigSpace(walk=walk).read()) == size

    def test_byte_by_byte(self) -> None:
        config = ConfigSpace(walk=False)
        for i, byte in enumerate((0x78563412).to_bytes(4, "big")):
            config.write(4 + i, bytes([byte]))
        assert config.fields.actual == 0x12345678

    @pytest.mark.parametrize(("offset", "size"), [(16, 1), (15, 2), (0, 17), (1 << 32, 4), (-1, 2)])
    def test_outside_is_refused(self, offset: int, size: int) -> None:
        with pytest.raises(ProtocolError, match="config-range"):
            ConfigSpace(walk=False).write(offset, bytes(size))

    def test_poison_is_locked_while_the_driver_runs(self) -> None:
        """MUST NOT modify poison_val while DRIVER_OK is set (Page Poison)."""
        rig = Rig()
        rig.balloon.write_config(12, b"\xaa\xaa\xaa\xaa")
        assert not rig.balloon.poisoned
        rig.balloon.reset()
        rig.balloon.write_config(12, b"\xaa\xaa\xaa\xaa")
        assert rig.balloon.poisoned
        rig.balloon.reset()
        assert not rig.balloon.poisoned

    @pytest.mark.parametrize("wrote", [True, False])
    def test_a_reset_found_out_late_keeps_the_poison(self, wrote: bool) -> None:
        """It may be no reset, but a guest that was paused before it used a ring: what it expects
        in its free pages still holds."""
        rig = Rig()
        rig.balloon.stop()
        rig.balloon.write_config(12, b"\xaa\xaa\xaa\xaa")
        rig.balloon.start()
        rig.balloon.stop()
        if wrote:
            rig.balloon.write_config(4, b"\1\0\0\0\0\0\0\0\xbb\xbb\xbb\xbb")
        rig.balloon.restart()
        fields = rig.balloon.config.fields
        assert (fields.actual, fields.poison_val) == (0, 0xBBBBBBBB if wrote else 0xAAAAAAAA)
        rig.balloon.start()
        assert rig.balloon.poisoned


def report(rig: Rig, total: int, available: int) -> None:
    """Make statistics in bytes available to the device."""
    entries = ((StatTag.MEMTOT, total), (StatTag.AVAIL, available))
    rig.send(2, (rig.bytes(b"".join(BalloonStat(tag=int(t), val=v).build() for t, v in entries)),))


def restart(rig: Rig) -> None:
    """Reset the device and start it for the next driver."""
    rig.balloon.reset()
    rig.set_up(tuple(rig.drivers))


CARELESS = [(1, "1M"), (8 * MIB, "below"), (65 * MIB, "above")]


class TestOperator:
    def test_target_is_the_guests_logical_size(self) -> None:
        rig = Rig()
        rig.balloon.set_target(48 * MIB)
        assert BalloonConfig.parse(rig.balloon.read_config()).num_pages == 16 * MIB // 4096
        assert rig.config_changes == 1

    @pytest.mark.parametrize(("value", "pages"), [(64 * MIB, 0), (1 << 50, 0), (1, 16383)])
    def test_target_at_the_limits(self, value: int, pages: int) -> None:
        rig = Rig()
        rig.balloon.set_target(value, force=True)
        assert rig.balloon.config.fields.num_pages == pages

    def test_no_guest_no_target(self) -> None:
        with pytest.raises(UsageError, match="front-end"):
            Balloon().set_target(1 << 30)
        with pytest.raises(UsageError, match="above 0"):
            Rig().balloon.set_target(0)

    def test_no_driver_no_target(self) -> None:
        rig = Rig()
        rig.balloon.stop()
        with pytest.raises(UsageError, match="no balloon driver runs"):
            rig.balloon.set_target(48 * MIB)
        assert rig.balloon.config.fields.num_pages == 0

    @pytest.mark.parametrize(("value", "says"), CARELESS)
    def test_a_careless_target_changes_nothing(self, value: int, says: str) -> None:
        rig = Rig()
        with pytest.raises(UsageError, match=says):
            rig.balloon.set_target(value)
        assert (rig.balloon.config.fields.num_pages, rig.config_changes) == (0, 0)

    def test_a_small_driver_does_not_inherit_the_target(self) -> None:
        """A crash kernel of 146 MiB starts in a guest of 4 GiB whose target is 1 GiB."""
        rig = Rig(
            features=int(ALL_FEATURES & ~BalloonFeature.DEFLATE_ON_OOM),
            memory=make_memory((0, 4096 * MIB)),
        )
        report(rig, 4000 * MIB, 3900 * MIB)
        rig.balloon.set_target(1024 * MIB)
        assert rig.balloon.config.fields.num_pages == 3072 * MIB // 4096
        restart(rig)
        report(rig, 146 * MIB, 100 * MIB)
        assert rig.balloon.config.fields.num_pages == 68 * MIB // 4096
        with pytest.raises(UsageError, match="below"):
            rig.balloon.set_target(32 * MIB)
        restart(rig)
        report(rig, 4000 * MIB, 3900 * MIB)
        assert rig.balloon.config.fields.num_pages == 3072 * MIB // 4096

    def test_an_unplugged_region_is_not_the_guests(self) -> None:
        """512 MiB, and 1 GiB of virtio-mem of which nothing is plugged."""
        rig = Rig(memory=make_memory((0, 512 * MIB), (1 << 32, 1024 * MIB)))
        report(rig, 470 * MIB, 400 * MIB)
        rig.balloon.set_target(512 * MIB)
        assert rig.balloon.config.fields.num_pages == 0
        rig.balloon.set_target(270 * MIB)
        assert rig.balloon.config.fields.num_pages == 200 * MIB // 4096
        assert rig.balloon.target_bytes == 270 * MIB

    def test_actual_is_what_the_driver_says_and_never_negative(self) -> None:
        rig = Rig()
        rig.balloon.write_config(4, (1024).to_bytes(4, "little"))
        assert rig.event("BALLOON_CHANGE") == {"actual": 60 * MIB}
        rig.balloon.write_config(4, (0xFFFF_FFFF).to_bytes(4, "little"))
        assert rig.balloon.actual_bytes == 0

    def test_unchanged_actual_is_no_event(self) -> None:
        rig = Rig()
        rig.balloon.write_config(0, rig.balloon.read_config())
        assert rig.events == []

    def test_rounds_need_their_feature(self) -> None:
        rig = Rig(features=int(BalloonFeature.STATS_VQ), present=(0, 1, 2))
        with pytest.raises(UsageError, match="FREE_PAGE_HINT"):
            rig.balloon.start_hinting()
        with pytest.raises(UsageError, match="vballoon_walk"):
            rig.balloon.start_walk()


class TestState:
    def test_travels(self) -> None:
        source, target = Rig(), Rig()
        source.balloon.set_target(32 * MIB)
        source.send(0, source.pfns(4096, 4097, 5000))
        source.balloon.start_hinting()
        target.balloon.load(source.balloon.save())
        assert target.balloon.config.fields.num_pages == 8192
        runs = target.balloon.skipmap.extents(Provenance.BALLOONED)
        assert runs.tolist() == [[4096, 4098], [5000, 5001]]
        target.balloon.start()
        assert target.balloon.start_hinting() == 3  # 2 was used on the other side

    def test_memory_may_come_after_the_state(self) -> None:
        """QEMU loads the state of a device before it sends the memory table."""
        source, target = Rig(), Rig()
        source.send(0, source.pfns(4096))
        whole, target.memory = target.memory, make_memory()
        target.balloon.memory_changed()
        target.balloon.load(source.balloon.save())
        target.memory = whole
        target.balloon.memory_changed()
        target.balloon.start()
        assert target.balloon.skipmap.extents(Provenance.BALLOONED).tolist() == [[4096, 4097]]
        target.balloon.reset()
        target.balloon.start()
        assert target.balloon.skipmap.count(Provenance.BALLOONED) == 0

    def test_nothing_of_the_guest_before_is_left(self) -> None:
        """A front-end may load a state into a device that served another moment of the guest."""
        rig = Rig()
        state = rig.balloon.save()
        rig.send(0, rig.pfns(4096))
        rig.balloon.start_hinting(hold=True)
        rig.send(3, (rig.bytes((2).to_bytes(4, "little")),), (rig.pages(4096, 512),))
        assert rig.balloon.skipmap.count(Provenance.HINTED) == 512
        rig.balloon.load(state)
        assert [
            rig.balloon.skipmap.count(p) for p in Provenance if p is not Provenance.REPORTED
        ] == [0, 0, 0]
        assert rig.balloon.hints.round is not None
        assert rig.balloon.hints.round.void_reason is not None
        assert rig.balloon.config.fields.free_page_hint_cmd_id == CMD_ID_DONE


def test_memory_that_goes_away_under_a_ring_stops_that_queue() -> None:
    """A ring reached by messages: the client refuses its page in the middle of things."""
    backing = make_memory((0, 64 * MIB))
    remote, peer = by_messages(backing)
    rig = Rig(memory=backing)
    driver = rig.drivers[0]
    ring = make_virtqueue(remote, rig.size, driver.addresses, driver.features, engine="scalar")
    rig.queues[0].ring = ring
    rig.drivers[0].add(*rig.pfns(4096))
    rig.drivers[0].publish()
    peer.refuse = set(range(driver.addresses.device, driver.addresses.device + 1024))
    assert not rig.balloon.process(rig.queues[0])
    assert rig.broken[0].rule == "dma-refused"


def test_a_turn_of_a_queue_ends_in_time_and_tells_that_more_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A guest that makes more and more available does not hold up the other queues."""
    rig = Rig()
    monkeypatch.setattr(device, "SECONDS_PER_KICK", 0)
    for _ in range(2):
        rig.drivers[0].add(*rig.pfns(4096))
    rig.drivers[0].publish()
    take = rig.queues[0].ring.take
    monkeypatch.setattr(rig.queues[0].ring, "take", lambda limit: take(1))
    assert rig.balloon.process(rig.queues[0])
    assert rig.queues[0].given == 1
    while rig.balloon.process(rig.queues[0]):
        pass
    assert (rig.queues[0].given, rig.queues[0].kicked) == (2, 1)  # continuing is not another kick
    while rig.balloon.process(rig.queues[0]):
        pass
    assert rig.queues[0].kicked == 2
