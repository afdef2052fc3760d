# SPDX-License-Identifier: Apache-2.0
"""Memory tables: set, replaced, extended, reduced, and malformed."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from virtio_conformance.findings import Closed, about, not_applicable, require
from virtio_conformance.memory import PAGE, GuestRam, Region
from virtio_conformance.rig_vhost_user import VhostUserRig
from virtio_conformance.vhost_user import FrontEnd, region_payload
from virtio_formats.vhost_user.features import ProtocolFeature as P
from virtio_formats.vhost_user.payloads import VhostUserMemory, VhostUserMemoryRegion
from virtio_formats.vhost_user.requests import Request

V1 = 1 << 32
NAME = "conformance-ram"
MakeRig = Callable[..., VhostUserRig]


def files(rig: VhostUserRig) -> int:
    """Return how many descriptors and mappings of our memory the back-end has."""
    descriptors = sum(NAME in name for name in rig.process.fds())
    return descriptors + rig.process.mappings(NAME)


@pytest.mark.requirement("vu.mem.add")
def test_memory_by_slots(new_rig: MakeRig, packed: bool) -> None:
    """Regions that are added one by one make up memory."""
    rig = new_rig(packed, slots=True)
    rig.need_protocol(P.CONFIGURE_MEM_SLOTS)
    with about("vu.mem.add"):
        rig.bring_up()
        for region in range(4):
            rig.run([rig.request(region, region=region)])


@pytest.mark.requirement("vu.mem.remove", "vu.mem.add")
def test_region_removed_and_added_again(new_rig: MakeRig) -> None:
    """A removed region is unmapped and closed; added again it works as before."""
    rig = new_rig(False, slots=True)
    rig.need_protocol(P.CONFIGURE_MEM_SLOTS)
    rig.bring_up()
    rig.run([rig.request(0, region=2)])
    region, held = rig.ram.regions[2], files(rig)
    require(rig.fe.remove_region(region) == 0, "REM_MEM_REG of a good region is refused")
    require(files(rig) < held, "the region is still open or mapped after its removal")
    rig.run([rig.request(1, region=1)])
    with about("vu.mem.add"):
        require(rig.fe.add_region(region) == 0, "ADD_MEM_REG after a removal is refused")
        rig.run([rig.request(2, region=2)])


@pytest.mark.requirement("vu.mem.remove")
def test_removed_region_is_not_used(new_rig: MakeRig) -> None:
    """A buffer in a region that was removed is not touched."""
    rig = new_rig(False, slots=True)
    rig.need_protocol(P.CONFIGURE_MEM_SLOTS)
    rig.bring_up()
    placed = rig.submit(rig.request(0, region=2))
    require(rig.fe.remove_region(rig.ram.regions[2]) == 0, "REM_MEM_REG is refused")
    before = rig.ram.picture()
    rig.main.publish()
    rig.kick(rig.profile.main)
    rig.main_quiet(0.1)
    rig.survive(spinning=True)
    rig.ram.expect_untouched(before, rig.allowed() + list(placed.exchange.may_change))


@pytest.mark.requirement("ring.addresses")
def test_region_with_a_running_ring_removed(new_rig: MakeRig) -> None:
    """Taking away the memory under a running ring does no harm."""
    rig = new_rig(False, slots=True)
    rig.need_protocol(P.CONFIGURE_MEM_SLOTS)
    rig.bring_up()
    rig.submit(rig.request(0))
    try:
        rig.fe.remove_region(rig.ram.regions[0])
        rig.main.publish()
        rig.kick(rig.profile.main)
        rig.main_quiet(0.1)
    except Closed:
        pass
    rig.survive(spinning=True)


@pytest.mark.requirement("vu.mem.remove-fd")
def test_descriptor_with_a_removal(new_rig: MakeRig) -> None:
    """A descriptor that comes with REM_MEM_REG is closed (or the message refused)."""
    rig = new_rig(False, slots=True)
    rig.need_protocol(P.CONFIGURE_MEM_SLOTS)
    rig.negotiate(V1 & rig.offered)
    held = files(rig)
    try:
        for _ in range(4):
            if rig.fe.remove_region(rig.ram.regions[2], [rig.ram.regions[2].fd]):
                break
            rig.fe.add_region(rig.ram.regions[2])
        rig.fe.barrier()
    except Closed:
        return
    require(files(rig) <= held, f"{files(rig) - held} descriptors more than before")


@pytest.mark.requirement("vu.ring.reconfigure-live", "vu.robust.leak")
def test_table_replaced(split_rig: VhostUserRig) -> None:
    """A new table replaces the old one, of which nothing is kept; rings continue."""
    rig = split_rig
    rig.bring_up()
    rig.warm_up()
    held = files(rig)
    for turn in range(6):
        rig.fe.set_memory(rig.ram)
        rig.run([rig.profile.exchange(rig, turn)])
    rig.fe.barrier()
    told = f"{files(rig) - held} descriptors or mappings more than before"
    require(files(rig) <= held, told, row="vu.robust.leak")


@pytest.mark.requirement("vu.mem.table-replaced")
def test_other_memory_for_stopped_rings(split_rig: VhostUserRig) -> None:
    """After a stop a completely different memory can be set, as after a guest's reboot."""
    rig = split_rig
    rig.bring_up()
    rig.warm_up()
    for index in rig.rings:
        rig.stop_ring(index)
    held = files(rig)
    old, rig.ram = rig.ram, GuestRam([(0, 1 << 20, 0), (0x8000_0000, 6 << 20, 3 * PAGE)])
    rig.notes.clear()
    before = old.picture()
    rig.fe.set_memory(rig.ram)
    for index in list(rig.rings):
        rig.start_ring(index, rig.make_ring())
    rig.driver_ok()
    for serial in range(4):
        rig.run([rig.profile.exchange(rig, serial)])
    old.expect_untouched(before)
    told = "something of the old memory is still held"
    require(files(rig) <= held, told, row="vu.robust.leak")
    old.close()


@pytest.mark.requirement("vu.robust.mem-slots")
def test_slots_used_wrongly(new_rig: MakeRig) -> None:
    """Adding a region twice and removing one that is not there are refused."""
    rig = new_rig(False, slots=True)
    rig.need_protocol(P.CONFIGURE_MEM_SLOTS)
    rig.negotiate(V1 & rig.offered)
    region = rig.ram.regions[1]
    try:
        verdict = rig.fe.add_region(region)
        require(verdict or not rig.fe.protocol & P.REPLY_ACK, "a region is accepted twice")
        require(rig.fe.remove_region(region) == 0, "the good region cannot be removed")
        rig.fe.remove_region(region)
        rig.fe.barrier()
    except Closed:
        pass
    rig.survive()


@pytest.mark.requirement("vu.robust.mem-slots", "vu.robust.leak")
def test_more_slots_than_there_are(new_rig: MakeRig) -> None:
    """More regions than GET_MAX_MEM_SLOTS are refused without harm."""
    rig = new_rig(False, slots=True)
    rig.need_protocol(P.CONFIGURE_MEM_SLOTS)
    rig.negotiate(V1 & rig.offered)
    limit = rig.fe.get_u64(Request.GET_MAX_MEM_SLOTS)
    fd = rig.ram.regions[0].fd
    try:
        rig.fe.protocol &= ~P.REPLY_ACK  # not one by one: that would take long
        for i in range(min(limit + 3, 600)):
            place = (1 << 40) + i * 16 * PAGE
            rig.fe.add_region(Region(place, PAGE, place, 0, fd, PAGE, rig.ram.regions[0].view))
        rig.fe.barrier()
    except Closed:
        pass
    rig.survive()


@pytest.mark.requirement("vu.mem.max-slots")
def test_as_many_slots_as_are_promised(new_rig: MakeRig) -> None:
    """As many regions as GET_MAX_MEM_SLOTS answers can be added, and the last one works."""
    rig = new_rig(False, slots=True)
    rig.need_protocol(P.CONFIGURE_MEM_SLOTS)
    rig.bring_up()
    limit = rig.fe.get_u64(Request.GET_MAX_MEM_SLOTS)
    require(limit > 0, f"GET_MAX_MEM_SLOTS answers {limit}")
    rest = min(limit, MOST_SLOTS) - len(rig.ram.regions)
    for i in range(rest):
        place = (1 << 40) + i * 2 * PAGE
        last = rig.ram.add_region(place, PAGE, 0)
        told = f"region {len(rig.ram.regions)} of {limit} is refused"
        require(rig.fe.add_region(last) == 0, told)
    rig.fe.barrier()
    rig.run([rig.request(1)], watch=False)
    if rest > 0:
        exchange = rig.profile.exchange(rig, 2)
        room = max(len(exchange.readable), exchange.writable)
        if room <= PAGE and not (exchange.readable and exchange.writable):
            rig.run([rig.place(exchange, region=len(rig.ram.regions) - 1)], watch=False)


MOST_SLOTS = 512
"""More than any back-end has (509 is what QEMU's machines and libvhost-user know)."""


def table(
    fe: FrontEnd, regions: list[VhostUserMemoryRegion], fds: list[int], count: int = -1
) -> None:
    """Send SET_MEM_TABLE with any contents; refusals and closing are allowed."""
    raw = VhostUserMemory.of(regions).build()
    if count >= 0:
        raw = count.to_bytes(4, "little") + raw[4:]
    try:
        fe.attempt(Request.SET_MEM_TABLE, raw, fds)
        fe.barrier()
    except Closed:
        pass


TABLES = [
    "too-many", "count-lies", "overlap", "wraps", "beyond-file", "no-fds", "fewer-fds",
    "more-fds", "odd-offset", "empty", "zero-size", "same-user", "pipe",
]  # fmt: skip


@pytest.mark.requirement("vu.robust.mem-table", "vu.robust.surplus-fds", "vu.robust.missing-fds")
@pytest.mark.parametrize("shape", TABLES)
def test_memory_tables_that_make_no_sense(split_rig: VhostUserRig, shape: str) -> None:
    """Tables with absurd contents are refused or harmless, and leave nothing open."""
    rig = split_rig
    rig.negotiate(V1 & rig.offered)
    held = files(rig)
    good = [region_payload(region) for region in rig.ram.regions]
    fds = [region.fd for region in rig.ram.regions]
    reader, writer = os.pipe()

    def one(**other: int) -> VhostUserMemoryRegion:
        values = {**{n: getattr(good[0], n) for n in good[0]._names}, **other}
        return VhostUserMemoryRegion(**values)

    shapes = {
        "too-many": ([*good] * 3, (fds * 3)[:8]),
        "overlap": ([good[0], one(guest_address=PAGE)], fds[:2]),
        "wraps": ([one(guest_address=(1 << 64) - PAGE, user_address=(1 << 64) - PAGE)], fds[:1]),
        "beyond-file": ([one(mmap_offset=1 << 40)], fds[:1]),
        "no-fds": (good, []),
        "fewer-fds": (good, fds[:1]),
        "more-fds": (good[:1], fds * 2),
        "odd-offset": ([one(mmap_offset=123)], fds[:1]),
        "empty": ([], []),
        "zero-size": ([one(size=0)], fds[:1]),
        "same-user": ([good[0], one(guest_address=1 << 40)], fds[:2]),
        "pipe": (good[:1], [reader]),
        "count-lies": (good, fds),
    }
    regions, sent = shapes[shape]
    table(rig.fe, regions, sent, count=0xFFFFFFFF if shape == "count-lies" else -1)
    os.close(reader)
    os.close(writer)
    rig.survive(spinning=True)
    if not rig.target.gone and rig.usable():
        require(files(rig) <= held + 3, f"{files(rig) - held} descriptors or mappings piled up")


@pytest.mark.requirement("vu.robust.leak", "vu.robust.surplus-fds")
@pytest.mark.parametrize("what", ["table", "surplus"])
def test_repeated_tables_leave_nothing_behind(split_rig: VhostUserRig, what: str) -> None:
    """The same table many times, with surplus descriptors too, holds no more than once."""
    rig = split_rig
    rig.negotiate(V1 & rig.offered)
    held = files(rig)
    fds = [region.fd for region in rig.ram.regions]
    good = [region_payload(region) for region in rig.ram.regions]
    for _ in range(10):
        if what == "table":
            rig.fe.set_memory(rig.ram)
        else:
            table(rig.fe, good, [*fds, *fds[:2]])
            if rig.fe.tap.closed:
                not_applicable("surplus descriptors end the connection")
    require(files(rig) <= held, f"{files(rig) - held} descriptors or mappings piled up")


@pytest.mark.requirement("vu.mem.table")
def test_ring_addresses_are_user_addresses(split_rig: VhostUserRig) -> None:
    """Without GPA_ADDRESSES ring addresses are the front-end's own."""
    rig = split_rig
    rig.bring_up()
    region = rig.ram.regions[0]
    require(region.user != region.guest, "the suite's addresses coincide")
    rig.run([rig.profile.exchange(rig, 0)])


@pytest.mark.requirement("vu.mem.table")
def test_ring_addresses_are_guest_addresses(new_rig: MakeRig) -> None:
    """With GPA_ADDRESSES they are guest-physical, in tables and rings."""
    from virtio_conformance.rig_vhost_user import COMMON_PROTOCOL

    rig = new_rig(False, protocol=COMMON_PROTOCOL | P.GPA_ADDRESSES)
    rig.need_protocol(P.GPA_ADDRESSES)
    for region in rig.ram.regions:
        region.user = region.guest
    rig.bring_up()
    rig.run([rig.profile.exchange(rig, 0)])
