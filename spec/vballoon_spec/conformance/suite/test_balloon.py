# SPDX-License-Identifier: Apache-2.0
"""The memory balloon: what its requests do to memory, judged by memory and nothing else."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest

from vballoon_spec.conformance.findings import Finding, not_applicable, require
from vballoon_spec.conformance.memory import PAGE
from vballoon_spec.conformance.profiles import Exchange
from vballoon_spec.conformance.rig import Placed, Rig
from vballoon_spec.conformance.ring import Segment
from vballoon_spec.virtio.balloon import BalloonCmdId, BalloonConfig, BalloonFeature, BalloonStat

MakeRig = Callable[..., Rig]
F = BalloonFeature
INFLATE, DEFLATE = 0, 1


@pytest.fixture(autouse=True)
def only_balloons(profile: Any) -> None:
    """These tests are for one device type."""
    if profile.name != "balloon":
        not_applicable("for memory balloons")


def pages(rig: Rig, count: int, region: int = 1) -> int:
    """Fresh pages of guest memory, full of data."""
    start = rig.ram.alloc(count * PAGE, PAGE, region)
    require(not rig.ram.is_hole(start), "the suite's memory has holes")
    return start


def pfns(*addresses: int) -> bytes:
    """An inflate or deflate buffer."""
    return b"".join(struct.pack("<I", address // PAGE) for address in addresses)


def freed(rig: Rig, start: int, count: int) -> list[int]:
    """Which of *count* pages are holes."""
    return [i for i in range(count) if rig.ram.is_hole(start + i * PAGE)]


def expect_freed(rig: Rig, start: int, count: int) -> None:
    """All of these pages are holes, unless discards are switched off (then none)."""
    due = list(range(count)) if rig.target.options.discards else []
    found = freed(rig, start, count)
    missing, surplus = sorted(set(due) - set(found)), sorted(set(found) - set(due))
    require(not missing, f"{len(missing)} of {count} pages hold memory still, e.g. {missing[:3]}")
    require(not surplus, f"pages were freed although discards are off: {surplus[:3]}")


def inflate(rig: Rig, data: bytes, spans: list[tuple[int, int]], *, queue: int = INFLATE) -> None:
    """One buffer of page numbers; only *spans* may change; used length 0."""
    exchange = Exchange(data, verify=no_bytes, may_change=tuple(spans))
    rig.run([exchange], queue=queue)


def no_bytes(used: int, data: bytes) -> str:
    """Nothing is written to these buffers."""
    return f"used length {used} for a buffer that nothing is written to" if used else ""


@pytest.mark.requirement("balloon.inflate.frees", "balloon.inflate.exact", "balloon.used-len.zero")
@pytest.mark.parametrize("region", [0, 1, 2])
def test_inflate_frees_exactly(rig: Rig, region: int) -> None:
    """Pages of an inflate request are holes by its acknowledgement; their neighbours are not."""
    rig.bring_up()
    start = pages(rig, 9, region)
    chosen = [start + i * PAGE for i in (1, 2, 5, 7)]
    inflate(rig, pfns(*chosen), [(page, page + PAGE) for page in chosen])
    for i in range(9):
        hole, due = rig.ram.is_hole(start + i * PAGE), i in (1, 2, 5, 7)
        due = due and rig.target.options.discards
        require(hole == due, f"page {i} is {'a hole' if hole else 'there'}")


@pytest.mark.requirement("balloon.inflate.exact", "balloon.inflate.frees")
def test_first_and_last_page_of_regions(rig: Rig) -> None:
    """At a region's edges only guest memory is freed, not the file around it."""
    rig.bring_up()
    for region in rig.ram.regions[1:]:
        for page in (region.end - PAGE, region.guest + region.size // 2):
            inflate(rig, pfns(page), [(page, page + PAGE)])
            expect_freed(rig, page, 1)


@pytest.mark.requirement("balloon.length.any", "balloon.inflate.frees")
@pytest.mark.parametrize("count", [256, 257, 512])
def test_long_lists(rig: Rig, count: int) -> None:
    """More than 256 page numbers in one buffer, also cut into descriptors."""
    rig.bring_up()
    start = pages(rig, count)
    data = pfns(*[start + i * PAGE for i in range(count)])
    placed = rig.place(
        Exchange(data, verify=no_bytes, may_change=((start, start + count * PAGE),)),
        cut=(4, 1, 100, 3),
    )
    rig.run([placed])
    expect_freed(rig, start, count)


@pytest.mark.requirement("balloon.length.any", "balloon.inflate.exact")
@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 9])
def test_lists_of_odd_length(rig: Rig, length: int) -> None:
    """Lists that end within a number: the buffer comes back, or the queue is stopped."""
    rig.bring_up()
    start = pages(rig, 3)
    data = pfns(start, start + PAGE, start + 2 * PAGE)[:length]
    placed = rig.submit(rig.place(Exchange(data)))
    before = rig.ram.picture()
    rig.main.publish()
    rig.kick(INFLATE)
    rig.main_quiet(0.1)
    rig.survive()
    whole = length // 4
    rig.ram.expect_untouched(before, [*rig.allowed(), (start, start + whole * PAGE)])
    if rig.main.poll():
        inflate(rig, pfns(start), [(start, start + PAGE)])
    require(placed.id >= 0, "the suite did not submit")


@pytest.mark.requirement("balloon.pfn.unsigned", "balloon.inflate.exact", "ring.bad-address")
@pytest.mark.parametrize("queue", [INFLATE, DEFLATE], ids=["inflate", "deflate"])
@pytest.mark.parametrize(
    "pfn", [0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x30000, 0x200, 0x3FFFF, 0x40600, 0xC0000]
, ids=hex)  # fmt: skip
def test_pages_that_do_not_exist(rig: Rig, queue: int, pfn: int) -> None:
    """Numbers outside memory change nothing; the good ones beside them may be honoured."""
    rig.bring_up()
    start = pages(rig, 2)
    data = pfns(start) + struct.pack("<I", pfn) + pfns(start + PAGE)
    rig.submit(rig.place(Exchange(data)), queue=queue)
    before = rig.ram.picture()
    ring = rig.rings[queue]
    ring.publish()
    rig.kick(queue)
    rig.main_quiet(0.1)
    rig.survive()
    span = (start, start + 2 * PAGE) if queue == INFLATE else (start, start)
    rig.ram.expect_untouched(before, [*rig.allowed(), span])


@pytest.mark.requirement("balloon.deflate.untouched", "balloon.used-len.zero")
def test_deflate_changes_nothing(rig: Rig) -> None:
    """Deflating leaves memory alone: pages the guest writes after it are the guest's."""
    rig.bring_up()
    start = pages(rig, 4)
    every = [start + i * PAGE for i in range(4)]
    inflate(rig, pfns(*every), [(start, start + 4 * PAGE)])
    rig.ram.write(start + PAGE, b"guest" * 100)
    inflate(rig, pfns(*every), [], queue=DEFLATE)
    inflate(rig, pfns(*every), [], queue=DEFLATE)
    require(rig.ram.read(start + PAGE, 5) == b"guest", "the guest's data is gone")
    inflate(rig, pfns(start), [(start, start + PAGE)])
    expect_freed(rig, start, 1)


@pytest.mark.requirement("balloon.inflate.exact", "balloon.deflate.untouched")
def test_inflate_deflate_inflate_neighbours(rig: Rig) -> None:
    """Pages taken back are not freed with later inflations of their neighbours."""
    rig.bring_up()
    start = pages(rig, 512, 1)
    half = [start + i * PAGE for i in range(256)]
    inflate(rig, pfns(*half), [(start, start + 256 * PAGE)])
    inflate(rig, pfns(*half), [], queue=DEFLATE)
    rig.ram.write(start, b"\x77" * (256 * PAGE))
    rest = [start + i * PAGE for i in range(256, 512)]
    inflate(rig, pfns(*rest), [(start + 256 * PAGE, start + 512 * PAGE)])


# -- configuration ---------------------------------------------------------------------------


@pytest.mark.requirement("balloon.config.actual", "vu.config.read-only")
def test_configuration_fields(split_rig: Rig) -> None:
    """actual is the driver's; num_pages and the hinting command are the device's."""
    rig = split_rig
    rig.bring_up()
    rig.write_config(4, (1234).to_bytes(4, "little"))
    whole = rig.read_config(0, 16)
    require(whole[4:8] == (1234).to_bytes(4, "little"), f"actual reads {whole[4:8].hex()}")
    try:
        rig.write_config(0, b"\x11\x22\x33\x44" * 4)  # the whole block, as some front-ends do
    except Finding as refused:
        require("errno" in str(refused) or "closed" in str(refused), str(refused))
        return
    after = rig.read_config(0, 16)
    require(after[0:4] == whole[0:4], f"num_pages was overwritten: {after[0:4].hex()}")
    require(after[8:12] == whole[8:12], f"the hinting command was overwritten: {after[8:12].hex()}")


@pytest.mark.requirement("vu.config.get-size", "balloon.config.actual")
def test_configuration_change_reaches_the_front_end(split_rig: Rig, options: Any) -> None:
    """A target that the operator sets shows in num_pages."""
    rig = split_rig
    rig.bring_up()
    if not options.config_change:
        not_applicable("--config-change says how to make the device change its configuration")
    before = rig.read_config(0, 4)
    rig.change_configuration()
    rig.main_quiet(0.1)
    after = rig.read_config(0, 4)
    require(after != before, f"num_pages reads {after.hex()} before and after")


# -- the optional queues ---------------------------------------------------------------------


def roles(rig: Rig, features: int) -> dict[str, int]:
    """Queue numbers as Linux counts them: those of negotiated features, densely."""
    names = [("stats", F.STATS_VQ), ("hint", F.FREE_PAGE_HINT), ("report", F.PAGE_REPORTING)]
    found, number = {}, 2
    for name, bit in names:
        if features & bit:
            found[name], number = number, number + 1
    return found


def bring_up(rig: Rig, features: int, numbers: dict[str, int], **how: Any) -> None:
    """A balloon with optional features and their rings."""
    if features & ~rig.offered:
        not_applicable(f"features {features & ~rig.offered:#x} are not offered")
    rig.bring_up(extra=features, queues=[0, 1, *numbers.values()], **how)


COMBINATIONS = [
    sum(bit for bit, on in zip((2, 8, 32), (n & 1, n & 2, n & 4), strict=True) if on)
    for n in range(8)
]


def report(
    rig: Rig, queue: int, start: int, size: int, may: tuple[int, int] | None = None
) -> Placed:
    """Report one free range, whose memory is the buffer itself."""
    exchange = Exchange(b"", 0, may_change=(may or (start, start + size),))
    placed = Placed(exchange, [Segment(start, size, True)])
    rig.submit(placed, queue=queue)
    placed.exchange.writable = size
    placed.writable_at = start
    before = rig.ram.picture()
    rig.rings[queue].publish()
    rig.kick(queue)
    (used,) = rig.collect(rig.rings[queue], 1)
    require(used.len <= size, f"used length {used.len} for a range of {size} bytes")
    span = may or (start, start + size)
    placed.segments = []
    rig.ram.expect_untouched(before, [*rig.allowed(), span])
    return placed


@pytest.mark.requirement("balloon.queues.by-negotiated")
@pytest.mark.parametrize("features", COMBINATIONS, ids=lambda f: f"{f:#x}")
def test_queue_numbers(rig: Rig, features: int) -> None:
    """Each combination of statistics, hinting and reporting has its queues in dense order."""
    numbers = roles(rig, features)
    bring_up(rig, features, numbers)
    rig.run([rig.profile.exchange(rig, 0)])
    if "report" in numbers:
        start = pages(rig, 4)
        report(rig, numbers["report"], start, 4 * PAGE)
        expect_freed(rig, start, 4)
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


@pytest.mark.requirement("balloon.queues.by-negotiated")
def test_queue_number_of_the_standard(split_rig: Rig) -> None:
    """A driver that puts reporting on queue 4, as the standard numbers it, is served too."""
    bring_up(split_rig, F.PAGE_REPORTING, {"report": 4})
    start = pages(split_rig, 4)
    report(split_rig, 4, start, 4 * PAGE)
    expect_freed(split_rig, start, 4)


def stat(tag: int, value: int) -> bytes:
    """One statistics entry."""
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


@pytest.mark.requirement(
    "balloon.stats.unknown-tags", "balloon.stats.any-order", "balloon.stats.kept"
)
@pytest.mark.parametrize("what", STATISTICS)
def test_statistics(rig: Rig, what: str) -> None:
    """Statistics of any tags, order and number are taken; the other queues go on."""
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
    require(ring.outstanding <= 1, f"{ring.outstanding} buffers kept, one is what a device needs")


def hint(rig: Rig, queue: int, cmd_id: int, count: int = 4) -> int:
    """A block of hints under an id that nobody has issued; the pages, which have to stay."""
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
def test_hints_outside_a_round(rig: Rig, cmd_id: int) -> None:
    """Hints under an id that is not current leave their pages alone."""
    bring_up(rig, F.FREE_PAGE_HINT, {"hint": 2})
    hint(rig, 2, cmd_id)
    hint(rig, 2, cmd_id, 1)
    rig.survive()


@pytest.mark.requirement("balloon.hint.idle-command")
def test_hinting_command_at_rest(split_rig: Rig) -> None:
    """Without a round the hinting command is STOP or DONE."""
    rig = split_rig
    bring_up(rig, F.FREE_PAGE_HINT, {"hint": 2})
    config = BalloonConfig.parse(rig.read_config(0, 16).ljust(BalloonConfig.SIZE, b"\0"))
    require(config.free_page_hint_cmd_id in (0, 1), f"command {config.free_page_hint_cmd_id}")


@pytest.mark.requirement("balloon.report.frees", "balloon.report.exact")
@pytest.mark.parametrize("count", [1, 2, 512])
def test_reports_free_exactly(rig: Rig, count: int) -> None:
    """A reported range is holes by its acknowledgement; nothing beside it changes."""
    bring_up(rig, F.PAGE_REPORTING, {"report": 2})
    start = pages(rig, count)
    report(rig, 2, start, count * PAGE)
    expect_freed(rig, start, count)
    report(rig, 2, start, count * PAGE)


@pytest.mark.requirement("balloon.report.exact", "balloon.inflate.exact")
@pytest.mark.parametrize(
    ("shift", "size"), [(0, PAGE + 1), (1, PAGE), (PAGE - 1, PAGE + 2), (0, 100), (8, 2 * PAGE)]
)
def test_reports_of_partial_pages(rig: Rig, shift: int, size: int) -> None:
    """Of a range that does not begin or end with a page only whole pages may be freed."""
    bring_up(rig, F.PAGE_REPORTING, {"report": 2})
    start = pages(rig, 4)
    first = -(-(start + shift) // PAGE) * PAGE
    last = (start + shift + size) // PAGE * PAGE
    report(rig, 2, start + shift, size, may=(first, max(first, last)))


@pytest.mark.requirement("balloon.report.exact", "balloon.report.frees")
def test_report_of_several_ranges(rig: Rig) -> None:
    """One buffer can report several ranges."""
    bring_up(rig, F.PAGE_REPORTING, {"report": 2})
    start = pages(rig, 12)
    ranges = [(start, 2), (start + 4 * PAGE, 1), (start + 8 * PAGE, 3)]
    placed = Placed(Exchange(b""), [Segment(a, n * PAGE, True) for a, n in ranges])
    rig.submit(placed, queue=2)
    before = rig.ram.picture()
    rig.rings[2].publish()
    rig.kick(2)
    rig.collect(rig.rings[2], 1)
    rig.ram.expect_untouched(before, rig.allowed([placed]))
    for addr, count in ranges:
        expect_freed(rig, addr, count)


@pytest.mark.requirement("balloon.report.poison-kept")
@pytest.mark.parametrize("value", [0xAAAAAAAA, 0x01020304])
def test_reports_with_poison(rig: Rig, value: int) -> None:
    """With PAGE_POISON a reported page keeps its contents or takes the poison value."""
    features = F.PAGE_REPORTING | F.PAGE_POISON
    poison = value.to_bytes(4, "little")
    bring_up(rig, features, {"report": 2}, configure=lambda: rig.write_config(12, poison))
    start = pages(rig, 2)
    expected = poison * (PAGE // 2)
    rig.ram.write(start, expected)
    report(rig, 2, start, 2 * PAGE)
    now = rig.ram.read(start, 2 * PAGE)
    require(now == expected, f"poisoned pages read {now[:4].hex()}, due is {expected[:4].hex()}")
