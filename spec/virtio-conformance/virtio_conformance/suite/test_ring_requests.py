# SPDX-License-Identifier: Apache-2.0
"""Well-formed requests in every shape: what comes back, and what must not change."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from virtio_conformance.findings import Hang, about, not_applicable, require
from virtio_conformance.memory import PAGE, Picture
from virtio_conformance.rig import Placed, Rig
from virtio_conformance.ring import Segment
from virtio_formats.virtio.features import VIRTIO_F_IN_ORDER, VIRTIO_F_INDIRECT_DESC


@pytest.mark.requirement(
    "split.used.id",
    "split.used.len-written",
    "split.desc.readable-unwritten",
    "split.desc.table-unwritten",
    "packed.used.id",
    "packed.used.len-written",
    "packed.desc.readable-unwritten",
    "packed.event.driver-area-unwritten",
    "vu.ring.enabled",
    "ring.stray-write",
)
def test_one_request(rig: Rig) -> None:
    """A request comes back once, with its id and a true length; nothing else changes."""
    rig.bring_up()
    for serial in range(2):
        placed = rig.submit(rig.request(serial))
        before = rig.ram.picture()
        rig.main.publish()
        rig.kick(rig.profile.main)
        try:
            used = rig.collect(rig.main, 1)
        except Hang as hang:
            served = "vu.ring.enabled" if rig.transport == "vhost-user" else ""
            hang.row = served
            raise
        rig.check([placed], used)
        expect_only_its_own(rig, before, placed)


def expect_only_its_own(rig: Rig, before: Picture, placed: Placed) -> None:
    """Raise a finding about the row that is broken when memory changed that must not."""
    driver = rig.main.areas[1]
    every = (0, 1 << 64)
    allowed = rig.allowed([placed])
    places = {
        rig.ring_row("desc.readable-unwritten"): [
            (s.addr, s.addr + s.len) for s in placed.segments if not s.write
        ]
    }
    if rig.packed:
        places["packed.event.driver-area-unwritten"] = [(driver, driver + 4)]
    else:
        table = rig.main.areas[0]
        places["split.desc.table-unwritten"] = [(table, table + 16 * rig.main.size)]
    for row, spans in places.items():
        for low, high in spans:
            rest = [(every[0], low), (high, every[1])]
            rig.ram.expect_untouched(before, [*allowed, *rest], row=row)
    rig.ram.expect_untouched(before, allowed, row="ring.stray-write")


@pytest.mark.requirement("split.used.len-written", "packed.used.len-written")
def test_bytes_within_the_used_length_were_written(rig: Rig) -> None:
    """Every byte that the used length covers has been written."""
    if not rig.profile.writes:
        not_applicable("requests of this device have no device-writable part")
    rig.bring_up()
    placed = rig.request()
    (used,) = rig.run([placed])
    room = placed.exchange.writable
    again = rig.place(placed.exchange)
    rig.ram.write(again.writable_at, bytes([0x3C]) * room)
    rig.run([again])
    first = rig.ram.read(placed.writable_at, used.len)
    second = rig.ram.read(again.writable_at, used.len)
    stale = [i for i in range(used.len) if first[i] == 0xA5 and second[i] == 0x3C]
    require(not stale, f"used length {used.len}, but byte {stale[:1]} of it was never written")


@pytest.mark.requirement("split.framing.any-layout", "split.desc.whole-chain", "packed.chain.order")
@pytest.mark.parametrize("cut", [(1,), (1, 1, 1), (3, 5), (2,) * 20], ids=["1", "111", "35", "2s"])
def test_any_cut_into_descriptors(rig: Rig, cut: tuple[int, ...]) -> None:
    """A request means the same however it is cut."""
    rig.bring_up()
    for serial in range(4):
        rig.run([rig.request(serial, cut=cut)])


@pytest.mark.requirement("split.framing.any-layout", "split.desc.whole-chain", "packed.chain.order")
@pytest.mark.parametrize("align", [1, 3])
def test_unaligned_buffers(rig: Rig, align: int) -> None:
    """Buffers may lie at odd addresses."""
    rig.bring_up()
    rig.ram.alloc(1, 1, 1)
    rig.run([rig.request(serial, align=align) for serial in range(3)])


@pytest.mark.requirement("split.desc.full-chain", "packed.chain.full")
@pytest.mark.parametrize("size", [4, 8])
def test_chain_as_long_as_the_queue(rig: Rig, size: int) -> None:
    """A chain may take every descriptor of the queue."""
    ring = rig.bring_up(size=size)
    placed = rig.request()
    total = sum(s.len for s in placed.segments)
    if not len(placed.segments) <= size <= total:
        not_applicable(f"a request of {total} bytes is not cut into {size} descriptors")
    pieces: list[Segment] = []
    spare = ring.size - len(placed.segments)
    for s in placed.segments:
        take = min(spare, s.len - 1)
        spare -= take
        pieces += [Segment(s.addr + i, 1, s.write) for i in range(take)]
        pieces.append(Segment(s.addr + take, s.len - take, s.write))
    require(sum(s.len for s in pieces) == total, "the suite has cut wrongly")
    require(len(pieces) == ring.size, "the suite has not filled the ring")
    placed.segments = pieces
    rig.run([placed])
    rig.run([rig.profile.exchange(rig, 1)])


@pytest.mark.requirement("split.indirect.works", "packed.indirect.works")
@pytest.mark.parametrize("cut", [(), (1, 2)], ids=["plain", "cut"])
@pytest.mark.parametrize("align", [16, 1], ids=["aligned", "odd"])
def test_indirect_table(rig: Rig, cut: tuple[int, ...], align: int) -> None:
    """A chain in an indirect table works, wherever the table lies."""
    rig.bring_up(VIRTIO_F_INDIRECT_DESC)
    for serial in range(3):
        if align == 1:
            rig.ram.alloc(1, 1, 1)
        rig.run([rig.request(serial, cut=cut)], indirect=True)


@pytest.mark.requirement("split.indirect.works", "packed.indirect.works")
@pytest.mark.parametrize("entries", [1, 2], ids=["within-an-entry", "between-entries"])
def test_indirect_table_across_adjacent_regions(rig: Rig, entries: int) -> None:
    """A table may run from one region into the next, like any buffer."""
    rig.bring_up(VIRTIO_F_INDIRECT_DESC)
    boundary = rig.ram.regions[2].guest
    for serial in range(3):
        placed = rig.request(serial, cut=(1, 1))
        if len(placed.segments) < 2:
            not_applicable("the request has a single byte")
        placed.id = rig.main.add(
            placed.segments, indirect=boundary - (8 if entries == 1 else 16), publish=False
        )
        before = rig.ram.picture()
        rig.main.publish()
        rig.kick(rig.profile.main)
        rig.check([placed], rig.collect(rig.main, 1))
        rig.ram.expect_untouched(before, rig.allowed([placed]))


@pytest.mark.requirement("split.indirect.write-flag-ignored")
def test_write_flag_on_an_indirect_descriptor(split_rig: Rig) -> None:
    """The WRITE flag beside INDIRECT means nothing."""
    rig = split_rig
    rig.bring_up(VIRTIO_F_INDIRECT_DESC)
    ring = rig.main_split
    placed = rig.submit(rig.request(), indirect=True)
    ring.desc["flags"][placed.id] |= 2
    before = rig.ram.picture()
    ring.publish()
    rig.kick(rig.profile.main)
    rig.check([placed], rig.collect(ring, 1))
    rig.ram.expect_untouched(before, rig.allowed([placed]))


@pytest.mark.requirement("split.indirect.after-direct")
def test_direct_descriptors_then_an_indirect_one(split_rig: Rig) -> None:
    """Direct descriptors may be followed by one indirect descriptor."""
    from virtio_conformance.ring_split import build_table

    rig = split_rig
    rig.bring_up(VIRTIO_F_INDIRECT_DESC)
    ring = rig.main_split
    placed = rig.request(cut=(1, 1))
    if len(placed.segments) < 2:
        not_applicable("the request has a single byte")
    first, rest = placed.segments[0], placed.segments[1:]
    table = rig.ram.alloc(16 * len(rest), 16, 1)
    rig.ram.write(table, build_table(rest))
    placed.segments = [first, Segment(table, 16 * len(rest))]
    placed.id = ring.add(placed.segments, publish=False)
    second = ring.chains[placed.id][1]
    ring.desc["flags"][second] = 4
    ring.publish()
    rig.kick(rig.profile.main)
    rig.check([placed], rig.collect(ring, 1))


@pytest.mark.requirement("split.used.index-wrap", "packed.wrap", "packed.used.skip")
@pytest.mark.parametrize("size", [2, 4, 5, 7, 16, 255, 256])
def test_around_the_ring(rig: Rig, size: int) -> None:
    """Chains of changing length go around the ring many times."""
    if not rig.packed and size & (size - 1):
        not_applicable("split rings have sizes that are powers of two")
    rig.bring_up(size=size)
    cuts = [(), (1,), (1, 1), (1, 1, 1)]
    rig.request()  # whatever a profile keeps in memory is there before the mark
    mark = rig.ram.regions[1].next_free
    serial = 0
    for turn in range(14):
        batch: list[Placed] = []
        room = size
        while room > 0 and len(batch) < max(16, size // 3):
            placed = rig.request(serial, cut=cuts[(serial + turn) % 4])
            serial += 1
            if len(placed.segments) > room:
                break
            room -= len(placed.segments)
            batch.append(placed)
        if not batch:
            batch = [rig.request(serial)]
        if len(batch[0].segments) > size:
            not_applicable(f"a request needs more than {size} descriptors")
        rig.run(batch, watch=turn % 4 == 0)
        rig.ram.regions[1].next_free = mark


@pytest.mark.requirement("split.used.index-wrap")
@pytest.mark.parametrize("start", [65535, 65533, 32767])
def test_index_past_65535(rig: Rig, start: int) -> None:
    """Free-running indices continue from 65535 to 0."""
    if rig.packed or not rig.can_stop:
        not_applicable("only a split ring over vhost-user can start at any index")
    rig.negotiate((1 << 32 | rig.profile.features) & rig.offered)
    if not rig.profile.has_requests:
        not_applicable("no device profile, so no valid request is known")
    for index in rig.profile.queues:
        ring = rig.make_ring(16, start=start)
        rig.start_ring(index, ring, base=start)
    rig.driver_ok()
    rig.profile.prepare(rig)
    for serial in range(0, 40, 4):
        rig.run([rig.profile.exchange(rig, serial + i) for i in range(4)])


@pytest.mark.requirement("split.used.id", "packed.order.used-consecutive", "ring.return-or-stop")
def test_a_full_ring_at_once(rig: Rig) -> None:
    """As many requests as the ring holds, published at once, all come back once."""
    ring = rig.bring_up(size=32)
    per = len(rig.request().segments)
    rig.run([rig.profile.exchange(rig, serial) for serial in range(ring.size // per)])
    rig.run([rig.profile.exchange(rig, serial) for serial in range(ring.size // per)])


@pytest.mark.requirement("packed.desc.only-available", "packed.desc.used-final")
def test_packed_descriptors_of_another_round(new_rig: Callable[..., Rig]) -> None:
    """Slots whose AVAIL bit has not changed are not used; used ones stay as they are."""
    rig = new_rig(True)
    rig.bring_up(size=8)
    ring = rig.main_packed
    placed = rig.submit(rig.request())
    ahead = rig.request(1)
    stale = ring.available(ring.wrap ^ 1)
    taken = ring.next_slot  # the slots in front of this one are the good request's
    for s in ahead.segments:
        ring.write_slot(ring.next_slot, s.addr, s.len, 7, stale | (2 if s.write else 0))
    before = rig.ram.picture()
    ring.publish()
    for _ in range(2):
        rig.kick(rig.profile.main)
        rig.main_quiet(0.1)
    rig.check([placed], rig.collect(ring, 1))
    good = [(ring.ring_addr, ring.ring_addr + 16 * taken), *ring.device_span[1:]]
    good += [(s.addr, s.addr + s.len) for s in placed.segments if s.write]
    rig.ram.expect_untouched(before, [*good, *placed.exchange.may_change])


@pytest.mark.requirement("basic.features.in-order")
def test_in_order_use(rig: Rig) -> None:
    """With IN_ORDER buffers come back in the order in which they were made available."""
    from virtio_conformance.in_order import collect_in_order

    ring = rig.bring_up(VIRTIO_F_IN_ORDER, size=32)
    for turn in range(6):
        placed = [rig.submit(rig.request(8 * turn + i)) for i in range(7)]
        ring.publish()
        rig.kick(rig.profile.main)
        collect_in_order(rig, ring, [one.id for one in placed])


@pytest.mark.requirement("vu.mem.table", "vf.dma.map")
def test_buffer_across_adjacent_regions(rig: Rig) -> None:
    """A buffer may run from one region into the next when they are adjacent."""
    rig.bring_up()
    exchange = rig.profile.exchange(rig, 0)
    boundary = rig.ram.regions[2].guest
    if exchange.readable:
        start = boundary - len(exchange.readable) // 2
        rig.ram.write(start, exchange.readable)
    placed = rig.place(exchange)
    if exchange.readable:
        placed.segments[0] = Segment(start, len(exchange.readable))
    else:
        placed.writable_at = boundary - exchange.writable // 2
        placed.segments = [Segment(placed.writable_at, exchange.writable, True)]
    rig.run([placed])


@pytest.mark.requirement("vu.mem.table", "vf.dma.map")
@pytest.mark.parametrize("region", [0, 1, 2, 3])
def test_rings_and_buffers_in_every_region(rig: Rig, region: int) -> None:
    """Each region, at any file offset and address, can hold rings and buffers, to its last byte."""
    with about("vu.mem.table" if rig.transport == "vhost-user" else "vf.dma.map"):
        rig.ring_region = region
        rig.bring_up()
    exchange = rig.profile.exchange(rig, 0)
    placed = rig.place(exchange, region=region)
    rig.run([placed])
    last = rig.ram.regions[region]
    if exchange.readable:
        at = last.end - len(exchange.readable)
        rig.ram.write(at, exchange.readable)
        placed = rig.place(exchange)
        placed.segments[0] = Segment(at, len(exchange.readable))
        rig.run([placed])
    require(last.size % PAGE == 0, "the suite has made an odd region")
