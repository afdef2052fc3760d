# SPDX-License-Identifier: Apache-2.0
"""Malformed rings.  Required of any back-end: no crash, no hang, no write that is not allowed, no
busy loop, and that other queues and the next connection work."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from virtio_conformance.findings import about, not_applicable, require
from virtio_conformance.memory import Picture
from virtio_conformance.rig import Rig
from virtio_conformance.rig_vhost_user import VhostUserRig
from virtio_conformance.ring import Segment
from virtio_conformance.ring_split import INDIRECT, NEXT, WRITE, SplitRing
from virtio_formats.virtio.features import VIRTIO_F_INDIRECT_DESC, VIRTIO_F_RING_PACKED

END = 1 << 64
SETTLE = 0.15
"""Seconds that a back-end gets to process a malformed ring."""


def aftermath(
    rig: Rig, before: Picture, spans: list[tuple[int, int]], again: Callable[..., Rig] | None = None
) -> None:
    """Check for crashes, hangs and stray writes, the other queue, and a new connection."""
    rested = rests(rig)
    rig.survive(spinning=not rested)
    rig.ram.expect_untouched(before, spans)
    other = rig.profile.other
    if other is not None and not rig.target.gone and rig.usable():
        with about("ring.others-live"):
            rig.run([rig.profile.exchange(rig, 5)], queue=other, watch=False)
    if again is not None and not rig.target.gone:
        rig.leave()
        if rig.target.ends_after_a_connection():
            return
        with about("ring.others-live"):
            fresh = again(rig.packed)
            fresh.bring_up()
            fresh.run([fresh.profile.exchange(fresh, 1)])


def rests(rig: Rig) -> bool:
    """Wait :data:`SETTLE` seconds; return whether the back-end was idle for most of them."""
    before = rig.process.cpu_seconds()
    rig.main_quiet(SETTLE)
    return rig.process.cpu_seconds() - before < SETTLE / 4


def offer(rig: Rig, head: int) -> Picture:
    """Publish *head* on the split ring and notify; return the memory just before."""
    ring = rig.main
    assert isinstance(ring, SplitRing)
    ring.offer_head(head)
    before = rig.ram.picture()
    ring.publish()
    rig.kick(rig.profile.main)
    return before


def up(rig: Rig, *bits: int) -> SplitRing:
    """Bring up with a small split ring that has served one request."""
    ring = rig.bring_up(*bits, size=16)
    rig.warm_up()
    assert isinstance(ring, SplitRing)
    return ring


def buffer(rig: Rig) -> int:
    """Return the address of 64 bytes that a malformed descriptor may point to."""
    return rig.ram.alloc(64, 64, 1)


LOOPS = {
    "self": [(0, NEXT, 0)],
    "pair": [(0, NEXT, 1), (1, NEXT, 0)],
    "self-write": [(0, NEXT | WRITE, 0)],
    "tail": [(0, NEXT, 1), (1, NEXT, 2), (2, NEXT, 1)],
    "whole": [(i, NEXT, (i + 1) % 16) for i in range(16)],
}


@pytest.mark.requirement("ring.loop", "ring.others-live")
@pytest.mark.parametrize("length", [0, 1], ids=["empty", "bytes"])
@pytest.mark.parametrize("shape", LOOPS)
def test_descriptor_loop(new_rig: Callable[..., Rig], shape: str, length: int) -> None:
    """A chain without an end, also one of empty descriptors."""
    rig = new_rig(False)
    ring = up(rig)
    where = buffer(rig)
    for slot, flags, following in LOOPS[shape]:
        ring.write_desc(slot, where, length, flags, following)
    before = offer(rig, 0)
    aftermath(rig, before, [*rig.allowed(), (where, where + 64)], new_rig)


@pytest.mark.requirement("ring.next-range", "ring.others-live")
@pytest.mark.parametrize("following", [16, 17, 255, 0x8000, 0xFFFF])
def test_next_beyond_the_table(new_rig: Callable[..., Rig], following: int) -> None:
    """A next index beyond the table, where memory happens to hold a valid descriptor."""
    rig = new_rig(False)
    ring = up(rig)
    where = buffer(rig)
    ring.write_desc(0, where, 1, NEXT, following)
    before = offer(rig, 0)
    aftermath(rig, before, rig.allowed(), new_rig)


@pytest.mark.requirement("ring.head-range", "ring.others-live")
@pytest.mark.parametrize("head", [16, 255, 0x7FFF, 0xFFFF])
def test_head_beyond_the_table(new_rig: Callable[..., Rig], head: int) -> None:
    """A head that lies beyond the table."""
    rig = new_rig(False)
    up(rig)
    before = offer(rig, head)
    aftermath(rig, before, rig.allowed(), new_rig)


@pytest.mark.requirement("ring.avail-jump", "ring.others-live")
@pytest.mark.parametrize("jump", [17, 0x4000, 0x8000, 0xFFFF])
def test_available_index_jumps(new_rig: Callable[..., Rig], jump: int) -> None:
    """The available index says that more buffers are there than the ring can hold."""
    rig = new_rig(False)
    ring = up(rig)
    where = buffer(rig)
    for slot in range(16):
        ring.write_desc(slot, where, 1, 0)
    before = rig.ram.picture()
    ring.set_avail_idx(ring.avail_idx + jump)
    rig.kick(rig.profile.main)
    aftermath(rig, before, rig.allowed(), new_rig)


ADDRESSES = {
    "null-gap": (0x3000_0000, 64),
    "top": (END - 64, 64),
    "wraps": (END - 32, 64),
    "wraps-to-ram": (END - 0x1000, 0x2000),
    "over-the-end": (0x4000_0000 + (6 << 20) - 32, 64),
    "huge": (0x4000_0000, 0xFFFFFFFF),
    "into-the-gap": ((2 << 20) - 32, 64),
    "bit-63": (1 << 63, 64),
}


@pytest.mark.requirement("ring.bad-address", "ring.others-live")
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
@pytest.mark.parametrize("place", ADDRESSES)
def test_addresses_outside_memory(
    new_rig: Callable[..., Rig], packed: bool, place: str, write: bool
) -> None:
    """A buffer that is not, or not wholly, in memory."""
    rig = new_rig(packed)
    rig.bring_up(size=16)
    rig.warm_up()
    addr, length = ADDRESSES[place]
    good = rig.request(1)
    for i, s in enumerate(good.segments):
        if s.write == write:
            good.segments[i] = type(s)(addr, length, write)
            break
    else:
        good.segments.append(type(good.segments[0])(addr, length, write))
    rig.submit(good)
    good.segments = [s for s in good.segments if s.addr != addr]
    before = rig.ram.picture()
    rig.main.publish()
    rig.kick(rig.profile.main)
    aftermath(rig, before, rig.allowed([good]), new_rig)


@pytest.mark.requirement("ring.zero-length", "ring.others-live")
@pytest.mark.parametrize("where", ["alone", "first", "last", "writable"])
def test_empty_descriptors(new_rig: Callable[..., Rig], packed: bool, where: str) -> None:
    """Descriptors of length zero, by themselves or beside good ones."""
    rig = new_rig(packed)
    rig.bring_up(size=16)
    placed = rig.request(1)
    empty = Segment(buffer(rig), 0, where == "writable")
    good = placed.segments
    placed.segments = {
        "alone": [empty],
        "first": [empty, *good],
        "last": [*good, Segment(empty.addr, 0, good[-1].write)],
        "writable": [*good, empty],
    }[where]
    rig.submit(placed)
    before = rig.ram.picture()
    rig.main.publish()
    rig.kick(rig.profile.main)
    aftermath(rig, before, rig.allowed([placed]), new_rig)


@pytest.mark.requirement("ring.wrong-direction", "ring.readable-after-writable", "ring.others-live")
@pytest.mark.parametrize("how", ["all-writable", "all-readable", "reversed"])
def test_wrong_directions(new_rig: Callable[..., Rig], packed: bool, how: str) -> None:
    """Readable where writable is due, the reverse, or in the wrong order."""
    rig = new_rig(packed)
    rig.bring_up(size=16)
    placed = rig.request(1, cut=(1,))
    segments = placed.segments
    if how == "reversed":
        placed.segments = [Segment(buffer(rig), 16, True), *[s for s in segments if not s.write]]
    else:
        write = how == "all-writable"
        placed.segments = [Segment(s.addr, s.len, write) for s in segments]
    rig.submit(placed)
    before = rig.ram.picture()
    rig.main.publish()
    rig.kick(rig.profile.main)
    with about("ring.readable-after-writable" if how == "reversed" else "ring.wrong-direction"):
        aftermath(rig, before, rig.allowed([placed]), new_rig)


INDIRECT_SHAPES = [
    "empty", "odd", "short", "huge", "longer-than-ring", "nested", "and-next", "unmapped", "wraps",
    "over-the-end", "loop", "next-range",
]  # fmt: skip


@pytest.mark.requirement("ring.indirect-malformed", "ring.others-live")
@pytest.mark.parametrize("shape", INDIRECT_SHAPES)
def test_malformed_indirect_table(new_rig: Callable[..., Rig], shape: str) -> None:
    """Indirect tables that no driver may make."""
    rig = new_rig(False)
    ring = up(rig, VIRTIO_F_INDIRECT_DESC)
    table, where = rig.ram.alloc(4096, 4096, 1), buffer(rig)
    entry = (where).to_bytes(8, "little") + (1).to_bytes(4, "little")
    flags = {"nested": INDIRECT, "loop": NEXT, "next-range": NEXT, "longer-than-ring": NEXT}
    following = {"loop": 0, "next-range": 99}
    for i in range(64):
        flag, target = flags.get(shape, 0), following.get(shape, i + 1)
        if shape == "longer-than-ring" and i == 63:
            flag, target = 0, 0
        raw = entry + flag.to_bytes(2, "little") + target.to_bytes(2, "little")
        rig.ram.write(table + 16 * i, raw)
    length = {
        "empty": 0,
        "odd": 17,
        "short": 15,
        "huge": 0xFFFFFFF0,
        "loop": 16,
        "nested": 16,
        "next-range": 32,
        "longer-than-ring": 64 * 16,
    }.get(shape, 16)
    address = {
        "unmapped": 0x3000_0000,
        "wraps": END - 8,
        "over-the-end": 0x4000_0000 + (6 << 20) - 8,
    }.get(shape, table)
    ring.write_desc(0, address, length, INDIRECT | (NEXT if shape == "and-next" else 0), 1)
    ring.write_desc(1, where, 1, 0)
    before = offer(rig, 0)
    aftermath(rig, before, rig.allowed(), new_rig)


@pytest.mark.requirement("ring.indirect-unnegotiated")
def test_indirect_without_negotiation(new_rig: Callable[..., Rig]) -> None:
    """An indirect descriptor although the feature was not negotiated does no harm."""
    rig = new_rig(False)
    ring = up(rig)
    placed = rig.submit(rig.request(1), indirect=True)
    before = rig.ram.picture()
    ring.publish()
    rig.kick(rig.profile.main)
    table = ring.desc["addr"][placed.id]
    require(int(table), "the suite made no table")
    aftermath(rig, before, rig.allowed([placed]), new_rig)


@pytest.mark.requirement("ring.return-or-stop")
def test_bad_buffers_among_good_ones(new_rig: Callable[..., Rig], packed: bool) -> None:
    """After a bad buffer the queue either stops or returns every good one exactly once."""
    rig = new_rig(packed)
    ring = rig.bring_up(size=16)
    rig.warm_up()
    good = [rig.submit(rig.request(serial)) for serial in range(2)]
    bad_slot = ring.add([Segment(0x3000_0000, 64)], publish=False)
    good += [rig.submit(rig.request(serial)) for serial in (2, 3)]
    ring.publish()
    rig.kick(rig.profile.main)
    rig.main_quiet(SETTLE)
    rig.survive()
    found = ring.poll()
    require(
        {u.id for u in found} <= {one.id for one in good} | {bad_slot},
        f"buffers came back that were not given: {found}",
    )
    first = {one.id for one in good[:2]} - {u.id for u in found}
    alive = not rig.target.gone and rig.usable()
    require(not alive or not first, f"good buffers in front of the bad one are lost: {first}")
    if alive and {one.id for one in good[2:]} <= {u.id for u in found}:
        require(bad_slot in {u.id for u in found}, "the bad buffer was never returned, others were")


@pytest.mark.requirement("ring.moving")
def test_descriptors_change_under_the_device(new_rig: Callable[..., Rig], packed: bool) -> None:
    """A driver that rewrites descriptors while the device reads them."""
    rig = new_rig(packed)
    ring = rig.bring_up(size=16)
    placed = rig.request(1)
    rig.run([placed])
    spans = [*rig.allowed([placed]), (0x4000_0000, 0x4000_0000 + (6 << 20))]
    before = rig.ram.picture()
    for turn in range(60):
        ring.lengths.clear()
        for slot in range(16):
            entry = ring.desc[slot]
            entry["addr"] = (placed.segments[0].addr, 0x3000_0000, END - 1)[(turn + slot) % 3]
            entry["len"] = (1, 0xFFFFFFFF, 0, 4096)[(turn * 7 + slot) % 4]
            entry["flags"] = (turn * 5 + slot * 3) & (0xFFFF if packed else 7)
        if not packed:
            rig.main_split.avail[2:] = (turn * 3) % 40
            rig.main_split.set_avail_idx(turn * 5)
        try:
            rig.kick(rig.profile.main)
        except AssertionError:
            break
    own = [(a, a + 8192) for a in ring.areas]
    rig.survive(spinning=True)
    rig.ram.expect_untouched(before, spans + own)


PACKED_SHAPES: dict[str, Callable[[int], list[tuple[int, int, int, int, int]]]] = {
    "endless": lambda where: [(i, where, 1, 3, 1) for i in range(16)],
    "reserved-flags": lambda where: [(0, where, 1, 3, 0x7C78)],
    "id-range": lambda where: [(0, where, 1, 0xFFFF, 0)],
    "indirect-unnegotiated": lambda where: [(0, where, 16, 3, 4)],
    "used-first": lambda where: [(0, where, 1, 3, 0x8000)],
}


@pytest.mark.requirement("ring.packed-malformed", "ring.loop", "ring.others-live")
@pytest.mark.parametrize("shape", PACKED_SHAPES)
def test_malformed_packed_list(new_rig: Callable[..., Rig], shape: str) -> None:
    """Packed descriptors that no driver may make; checking for buffers must not spin."""
    rig = new_rig(True)
    rig.bring_up(size=16)
    ring = rig.main_packed
    where = buffer(rig)
    rows = PACKED_SHAPES[shape](where)
    for offset, addr, length, name, flags in reversed(rows):
        slot = (ring.next_slot + offset) % 16
        wrap = ring.wrap ^ (ring.next_slot + offset >= 16)
        ring.write_slot(slot, addr, length, name, ring.available(wrap) | flags)
    before = rig.ram.picture()
    rig.kick(rig.profile.main)
    aftermath(rig, before, rig.allowed(), new_rig)


PACKED_TABLES = {
    "empty": (0, 0, 0),
    "short": (0, 15, 0),
    "odd": (0, 17, 0),
    "huge": (0, 0xFFFFFFF0, 0),
    "nested": (0, 16, 0),
    "and-next": (0, 16, NEXT),
    "unmapped": (0x3000_0000, 16, 0),
    "wraps": (END - 8, 16, 0),
    "over-the-end": (0x4000_0000 + (6 << 20) - 8, 16, 0),
}
"""Address (0: a table that is there), length and further flags of an indirect descriptor."""


@pytest.mark.requirement("ring.packed-malformed", "ring.indirect-malformed")
@pytest.mark.parametrize("shape", PACKED_TABLES)
def test_malformed_packed_indirect_table(new_rig: Callable[..., Rig], shape: str) -> None:
    """Packed indirect tables of impossible size, at impossible places, or nested."""
    rig = new_rig(True)
    rig.need(VIRTIO_F_RING_PACKED, "RING_PACKED")
    rig.bring_up(VIRTIO_F_INDIRECT_DESC, size=16)
    ring = rig.main_packed
    table, where = rig.ram.alloc(4096, 4096, 1), buffer(rig)
    inner = INDIRECT if shape == "nested" else 0
    entry = where.to_bytes(8, "little") + (16).to_bytes(4, "little")
    rig.ram.write(table, (entry + bytes(2) + inner.to_bytes(2, "little")) * 4)
    address, length, flags = PACKED_TABLES[shape]
    flags |= INDIRECT | ring.available(ring.wrap)
    ring.write_slot(ring.next_slot, address or table, length, 3, flags)
    before = rig.ram.picture()
    rig.kick(rig.profile.main)
    aftermath(rig, before, rig.allowed(), new_rig)


@pytest.mark.requirement("ring.addresses")
@pytest.mark.parametrize("size", [0, 3, 65535, 65536, 0xFFFFFFFF])
def test_ring_sizes(new_rig: Callable[..., Rig], size: int) -> None:
    """Invalid ring sizes are refused or harmless."""
    rig = new_rig(False)
    if not isinstance(rig, VhostUserRig):
        not_applicable("over vfio-user the register has 16 bits; see the tests of PCI")
    rig.negotiate((1 << 32) & rig.offered)
    rig.try_ring(size=size)
    rig.survive(spinning=True)


@pytest.mark.requirement("ring.addresses", "ring.bad-address")
@pytest.mark.parametrize("which", [0, 1, 2], ids=["desc", "driver", "device"])
@pytest.mark.parametrize("shift", ["gap", "end", "odd", "top"])
def test_ring_addresses(new_rig: Callable[..., Rig], which: int, shift: str) -> None:
    """A ring area outside memory, over its end, or unaligned; refused or harmless."""
    rig = new_rig(False)
    if not isinstance(rig, VhostUserRig):
        not_applicable("the same over vfio-user is in the tests of PCI")
    rig.negotiate((1 << 32) & rig.offered)
    before = rig.try_ring(bad_area=which, shift=shift)
    rig.survive(spinning=True)
    rig.ram.expect_untouched(before, rig.allowed())
