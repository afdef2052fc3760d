# SPDX-License-Identifier: Apache-2.0
"""The memory balloon's optional queues: statistics, hints, reports, and their numbers."""

from __future__ import annotations

from typing import Any

import pytest

from virtio_conformance.balloon import bring_up, expect_freed, pages, report
from virtio_conformance.findings import about, not_applicable, require
from virtio_conformance.memory import PAGE, Picture
from virtio_conformance.numbering import SCHEMES, Numbering
from virtio_conformance.profiles import Exchange
from virtio_conformance.rig import Placed, Rig
from virtio_conformance.rig_vfio_user import VfioUserRig
from virtio_conformance.rig_vhost_user import VhostUserRig
from virtio_conformance.ring import Segment
from virtio_conformance.ring_packed import PackedRing
from virtio_conformance.ring_split import SplitRing
from virtio_formats.virtio.balloon import BalloonCmdId, BalloonConfig, BalloonFeature, BalloonStat

F = BalloonFeature


@pytest.fixture(autouse=True)
def only_balloons(profile: Any) -> None:
    """Skip these tests for other device types."""
    if profile.name != "balloon":
        not_applicable("for memory balloons")


def roles(rig: Rig, numbering: Numbering, features: int, scheme: str = "") -> dict[str, int]:
    """Return the queue numbers of these features, as this device has them."""
    return numbering.numbers(features, rig.offered, scheme)


COMBINATIONS = [
    sum(bit for bit, on in zip((2, 8, 32), (n & 1, n & 2, n & 4), strict=True) if on)
    for n in range(8)
]


@pytest.mark.requirement("balloon.queues.exist")
@pytest.mark.parametrize("features", COMBINATIONS, ids=lambda f: f"{f:#x}")
def test_queues_of_each_combination(rig: Rig, numbering: Numbering, features: int) -> None:
    """Each combination of statistics, hinting and reporting has its queues."""
    use_queues(rig, features, roles(rig, numbering, features))


@pytest.mark.requirement("balloon.queues.exist")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("features", COMBINATIONS[4:], ids=lambda f: f"{f:#x}")
def test_queues_of_each_numbering(
    split_rig: Rig, numbering: Numbering, features: int, scheme: str
) -> None:
    """A device that serves several numberings does so for each combination with reporting."""
    if scheme not in numbering.schemes[1:]:
        not_applicable("this numbering is not served, or the other tests use it")
    use_queues(split_rig, features, roles(split_rig, numbering, features, scheme))


def use_queues(rig: Rig, features: int, numbers: dict[str, int]) -> None:
    """Bring up the queues under these numbers and use each."""
    bring_up(rig, features, numbers)
    rig.run([rig.profile.exchange(rig, 0)])
    if "report" in numbers:
        start = pages(rig, 4)
        report(rig, numbers["report"], start, 4 * PAGE)
        expect_freed(rig, start, 4, reported=True)
    if "hint" in numbers:
        hint(rig, numbers["hint"], 0x55AA)
    if "stats" in numbers:
        stats = rig.place(Exchange(stat(0, 1) + stat(4, 2)))
        rig.submit(stats, queue=numbers["stats"])
        rig.rings[numbers["stats"]].publish()
        rig.kick(numbers["stats"])
        rig.main_quiet(0.05)
    rig.survive()
    rig.run([rig.profile.exchange(rig, 1)])


@pytest.mark.requirement("balloon.queues.numbering")
def test_numbering(split_rig: Rig, numbering: Numbering) -> None:
    """Drivers with either numbering are served."""
    if not split_rig.offered & (F.FREE_PAGE_HINT | F.PAGE_REPORTING):
        not_applicable("neither hinting nor reporting is offered, and statistics are always 2")
    missing = sorted({"dense", "fixed"} - set(numbering.schemes))
    require(not missing, f"not served: {' and '.join(missing)}; {numbering}")


def up(rig: Rig, numbering: Numbering, feature: BalloonFeature, role: str) -> int:
    """Bring up one optional queue and return its number."""
    numbers = roles(rig, numbering, feature)
    bring_up(rig, feature, numbers)
    return numbers[role]


def stat(tag: int, value: int) -> bytes:
    """Return one statistics entry."""
    return BalloonStat(tag=tag, val=value).build()


STATISTICS = {
    "plain": b"".join(stat(tag, 1000 + tag) for tag in range(10)),
    "reversed": b"".join(stat(tag, 1) for tag in reversed(range(16))),
    "unknown": stat(0xFFFF, 1) + stat(3, 7) + stat(0x1234, 2) + stat(200, 3),
    "repeated": stat(4, 1) * 20,
    "odd": stat(4, 1)[:7],
    "empty-value": stat(4, (1 << 64) - 1),
    "many": b"".join(stat(tag % 700, tag) for tag in range(1000)),
}


@pytest.mark.requirement("balloon.stats.any-order", "balloon.stats.unknown-tags")
@pytest.mark.parametrize("what", ["plain", "reversed", "unknown"])
def test_statistics(rig: Rig, what: str) -> None:
    """Statistics of any tags and order are accepted; the other queues continue to work."""
    row = "balloon.stats.unknown-tags" if what == "unknown" else "balloon.stats.any-order"
    bring_up(rig, F.STATS_VQ, {"stats": 2})
    with about(row):
        before = give_statistics(rig, what)
        rig.ram.expect_untouched(before, rig.allowed())
        rig.survive()
        rig.run([rig.profile.exchange(rig, 0)])
        returned = rig.rings[2].poll()
        lengths = [u.len for u in returned]
        require(not any(lengths), f"used lengths {lengths}", row="balloon.used-len.zero")


@pytest.mark.requirement("balloon.robust.stats")
@pytest.mark.parametrize("what", STATISTICS)
def test_statistics_that_no_driver_sends(rig: Rig, what: str) -> None:
    """Three statistics buffers at once, with malformed entries: the other queues still work."""
    bring_up(rig, F.STATS_VQ, {"stats": 2})
    ring = rig.rings[2]
    for _ in range(3):  # the second and third come although the device has one already
        rig.submit(rig.place(Exchange(STATISTICS[what])), queue=2)
        before = rig.ram.picture()
        ring.publish()
        rig.kick(2)
        rig.main_quiet(0.04)
        rig.ram.expect_untouched(before, rig.allowed())
    rig.survive(spinning=True)
    rig.run([rig.profile.exchange(rig, 0)])
    returned = ring.poll()
    require(all(u.len == 0 for u in returned), f"used lengths {[u.len for u in returned]}")
    kept = f"{ring.outstanding} buffers kept, one is what a device needs"
    require(ring.outstanding <= 1, kept, row="balloon.stats.kept")


def give_statistics(rig: Rig, what: str = "plain") -> Picture:
    """Make a statistics buffer available and wait a moment; return what memory held before."""
    rig.submit(rig.place(Exchange(STATISTICS[what])), queue=2)
    before = rig.ram.picture()
    rig.rings[2].publish()
    rig.kick(2)
    rig.main_quiet(0.05)
    return before


@pytest.mark.requirement("balloon.stats.kept")
def test_kept_statistics_over_a_stop(rig: Rig) -> None:
    """Stopped, the device returns the buffer that it keeps or takes it again at the base."""
    if not isinstance(rig, VhostUserRig):
        not_applicable("a single ring can be stopped over vhost-user alone")
    bring_up(rig, F.STATS_VQ, {"stats": 2})
    ring = rig.rings[2]
    give_statistics(rig)
    base = rig.stop_ring(2) & 0xFFFF
    ring.poll()
    if isinstance(ring, PackedRing):
        due, start = ring.used_slot | ring.used_wrap << 15, base | base << 16
    else:
        assert isinstance(ring, SplitRing)
        due, start = ring.last_used, base
    require(base == due, f"base {base:#x}, returned is everything up to {due:#x}")
    rig.start_ring(2, ring, base=start)
    rig.kick(2)
    give_statistics(rig, "reversed")
    ring.poll()
    require(ring.outstanding == 1, f"{ring.outstanding} buffers are kept")
    rig.run([rig.profile.exchange(rig, 0)])


@pytest.mark.requirement("balloon.stats.kept")
def test_kept_statistics_over_a_reset(rig: Rig) -> None:
    """After a reset the kept buffer is not used, and the new driver starts without it."""
    if not isinstance(rig, VfioUserRig):
        not_applicable("a driver's reset is seen over vfio-user alone")
    bring_up(rig, F.STATS_VQ, {"stats": 2})
    give_statistics(rig)
    rig.pci.reset()
    old, before = rig.rings[2], rig.ram.picture()
    rig.rings.clear()
    bring_up(rig, F.STATS_VQ, {"stats": 2})
    for what in ("reversed", "plain"):
        give_statistics(rig, what)
    rig.rings[2].poll()  # a buffer of the old ring would be a finding
    require(rig.rings[2].outstanding == 1, f"{rig.rings[2].outstanding} buffers are kept")
    low, high = old.device_span[0]
    spans = [
        (start, end)
        for region in rig.ram.regions
        for start, end in ((region.guest, low), (high, region.end))
    ]
    rig.ram.expect_untouched(before, spans)
    rig.run([rig.profile.exchange(rig, 0)])


def hint(rig: Rig, queue: int, cmd_id: int, count: int = 4) -> int:
    """Send hints under an id that was never issued, and return the first page."""
    start = pages(rig, count)
    ring = rig.rings[queue]
    opening = rig.place(Exchange(BalloonCmdId(cmd_id=cmd_id).build()))
    body = Placed(Exchange(b"", 0), [Segment(start, count * PAGE, True)])
    closing = rig.place(Exchange(BalloonCmdId(cmd_id=0).build()))
    for placed in (opening, body, closing):
        rig.submit(placed, queue=queue)
    before = rig.ram.picture()
    ring.publish()
    rig.kick(queue)
    rig.collect(ring, 3)
    rig.main_quiet(0.03)
    rig.ram.expect_untouched(before, rig.allowed())
    return start


@pytest.mark.requirement("balloon.hint.stale-ignored", "balloon.hint.done-untouched")
@pytest.mark.parametrize("cmd_id", [0, 1, 2, 77, 0xFFFFFFFF])
def test_hints_outside_a_round(rig: Rig, numbering: Numbering, cmd_id: int) -> None:
    """Hints under an id that is not current leave their pages alone."""
    queue = up(rig, numbering, F.FREE_PAGE_HINT, "hint")
    hint(rig, queue, cmd_id)
    hint(rig, queue, cmd_id, 1)
    rig.survive()


@pytest.mark.requirement("balloon.hint.idle-command")
def test_hinting_command_at_rest(split_rig: Rig, numbering: Numbering) -> None:
    """Without a round the hinting command is STOP or DONE."""
    rig = split_rig
    up(rig, numbering, F.FREE_PAGE_HINT, "hint")
    config = BalloonConfig.parse(rig.read_config(0, 16).ljust(BalloonConfig.SIZE, b"\0"))
    require(config.free_page_hint_cmd_id in (0, 1), f"command {config.free_page_hint_cmd_id}")


@pytest.mark.requirement("balloon.report.exact", "balloon.report.frees")
@pytest.mark.parametrize("count", [1, 2, 512])
def test_reports_free_exactly(rig: Rig, numbering: Numbering, count: int) -> None:
    """A reported range is holes by its acknowledgement; nothing beside it changes."""
    queue = up(rig, numbering, F.PAGE_REPORTING, "report")
    start = pages(rig, count)
    report(rig, queue, start, count * PAGE)
    expect_freed(rig, start, count, reported=True)
    report(rig, queue, start, count * PAGE)


@pytest.mark.requirement("balloon.report.exact")
@pytest.mark.parametrize(
    ("shift", "size"), [(0, PAGE + 1), (1, PAGE), (PAGE - 1, PAGE + 2), (0, 100), (8, 2 * PAGE)]
)
def test_reports_of_partial_pages(rig: Rig, numbering: Numbering, shift: int, size: int) -> None:
    """Of a range that does not begin or end with a page only whole pages may be freed."""
    queue = up(rig, numbering, F.PAGE_REPORTING, "report")
    start = pages(rig, 4)
    first = -(-(start + shift) // PAGE) * PAGE
    last = (start + shift + size) // PAGE * PAGE
    report(rig, queue, start + shift, size, may=(first, max(first, last)))


OUTSIDE = {
    "over-the-end": (0x4000_0000 + (6 << 20) - 2 * PAGE, 4 * PAGE),
    "into-the-gap": ((2 << 20) - PAGE, 2 * PAGE),
    "the-gap": (0x3000_0000, PAGE),
    "wraps": ((1 << 64) - PAGE, 2 * PAGE),
    "huge": (0x4000_0000 + (6 << 20) - PAGE, 0xFFFFF000),
}


@pytest.mark.requirement("ring.bad-address", "balloon.report.exact")
@pytest.mark.parametrize("place", OUTSIDE)
def test_reports_beyond_memory(rig: Rig, numbering: Numbering, place: str) -> None:
    """Of a range that runs out of memory only guest memory is freed, never the rest of its file."""
    queue = up(rig, numbering, F.PAGE_REPORTING, "report")
    addr, size = OUTSIDE[place]
    ring = rig.rings[queue]
    ring.add([Segment(addr, size, True)], publish=False)
    before = rig.ram.picture()
    ring.publish()
    rig.kick(queue)
    rig.main_quiet(0.1)
    rig.survive(spinning=True)
    rig.ram.expect_untouched(before, [*rig.allowed(), (addr, addr + size)])
    rig.run([rig.profile.exchange(rig, 0)])


@pytest.mark.requirement("balloon.report.exact", "balloon.report.frees")
def test_report_over_adjacent_regions(rig: Rig, numbering: Numbering) -> None:
    """A range may run from one region into the next: both parts are freed."""
    queue = up(rig, numbering, F.PAGE_REPORTING, "report")
    start = rig.ram.regions[2].guest - 2 * PAGE
    report(rig, queue, start, 4 * PAGE)
    expect_freed(rig, start, 4, reported=True)


@pytest.mark.requirement("balloon.report.exact", "balloon.report.frees")
def test_report_of_several_ranges(rig: Rig, numbering: Numbering) -> None:
    """One buffer can report several ranges."""
    queue = up(rig, numbering, F.PAGE_REPORTING, "report")
    start = pages(rig, 12)
    ranges = [(start, 2), (start + 4 * PAGE, 1), (start + 8 * PAGE, 3)]
    placed = Placed(Exchange(b""), [Segment(a, n * PAGE, True) for a, n in ranges])
    rig.submit(placed, queue=queue)
    before = rig.ram.picture()
    rig.rings[queue].publish()
    rig.kick(queue)
    rig.collect(rig.rings[queue], 1)
    rig.ram.expect_untouched(before, rig.allowed([placed]))
    for addr, count in ranges:
        expect_freed(rig, addr, count, reported=True)


@pytest.mark.requirement("balloon.report.poison-kept")
@pytest.mark.parametrize("value", [0xAAAAAAAA, 0x01020304])
def test_reports_with_poison(rig: Rig, numbering: Numbering, value: int) -> None:
    """With PAGE_POISON a reported page keeps its contents or takes the poison value."""
    features = F.PAGE_REPORTING | F.PAGE_POISON
    poison = value.to_bytes(4, "little")
    numbers = roles(rig, numbering, features)
    bring_up(rig, features, numbers, configure=lambda: rig.write_config(12, poison))
    queue = numbers["report"]
    start = pages(rig, 2)
    expected = poison * (PAGE // 2)
    rig.ram.write(start, expected)
    report(rig, queue, start, 2 * PAGE)
    now = rig.ram.read(start, 2 * PAGE)
    require(now == expected, f"poisoned pages read {now[:4].hex()}, due is {expected[:4].hex()}")
