# SPDX-License-Identifier: Apache-2.0
"""The in-flight region of a packed ring: the steps of a back-end that takes over after a crash."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from virtio_conformance.findings import not_applicable, require
from virtio_conformance.rig import Placed
from virtio_conformance.rig_vhost_user import VhostUserRig
from virtio_conformance.ring_packed import PackedRing
from virtio_conformance.suite.test_vhost_user_inflight import (
    SIZE,
    inflight_region,
    need_inflight,
    resume_from,
)
from virtio_formats.vhost_user.inflight import (
    REGION_VERSION,
    DescStatePacked,
    QueueRegionPacked,
)
from virtio_formats.vhost_user.payloads import VhostUserInflight
from virtio_formats.virtio import packed

MakeRig = Callable[..., VhostUserRig]
WRAP = 1 << 15
"""The wrap counter in a ring base; every ring here is in its first round."""
MARK = 0x5A5A
"""What the driver writes to a slot that it has back; another value means a used buffer there."""


@dataclass(frozen=True)
class Crashed:
    """What a back-end that crashed left in the head of the region."""

    free_head: int
    old_free_head: int
    used_idx: int = 0
    old_used_idx: int = 0


def prepared(new_rig: MakeRig) -> tuple[VhostUserRig, VhostUserInflight, int, list[Placed]]:
    """Return a rig, its region, and four requests in a packed ring that is not started."""
    rig = new_rig(True)
    need_inflight(rig)
    if rig.profile.name == "fs":
        not_applicable("requests of this device need one before them on each connection")
    answer, fd = inflight_region(rig)
    for index in rig.profile.queues:
        rig.rings[index] = rig.make_ring(SIZE)
    placed = [rig.submit(rig.request(serial)) for serial in range(4)]
    rig.main.publish()
    return rig, answer, fd, placed


def entries(ring: PackedRing, buffers: Sequence[int], counters: Sequence[int]) -> list[bytes]:
    """Return the states of a back-end that has taken *buffers*, which begin in slot 0."""
    states: list[bytes] = []
    for buffer, counter in zip(buffers, counters, strict=True):
        first, count = len(states), ring.lengths[buffer]
        for slot in range(first, first + count):
            head, entry = slot == first, ring.desc[slot]
            state = DescStatePacked(
                inflight=int(head), padding=0, next=slot + 1, last=first + count - 1 if head else 0,
                num=count if head else 0, counter=counter if head else 0, id=int(entry["id"]),
                flags=int(entry["flags"]), len=int(entry["len"]), addr=int(entry["addr"]),
            )  # fmt: skip
            states.append(state.build())
    return states


def free(number: int, following: int, like: bytes) -> bytes:
    """Return a free entry *number* that still has the mark and the fields of an old buffer."""
    state = DescStatePacked.parse(like)
    state.inflight, state.next, state.last, state.counter = 1, following, number, 9
    return state.build()


def forge(
    rig: VhostUserRig, answer: VhostUserInflight, fd: int, crashed: Crashed, states: list[bytes]
) -> None:
    """Write the region of the main ring."""
    head = QueueRegionPacked(
        features=0, version=REGION_VERSION, desc_num=SIZE, free_head=crashed.free_head,
        old_free_head=crashed.old_free_head, used_idx=crashed.used_idx,
        old_used_idx=crashed.old_used_idx, used_wrap_counter=1, old_used_wrap_counter=1,
        padding=[0] * 10,
    )  # fmt: skip
    per = answer.mmap_size // (max(rig.profile.queues) + 1)
    at = answer.mmap_offset + per * rig.profile.main
    whole = head.build() + b"".join(states)
    with mmap.mmap(fd, answer.mmap_size + answer.mmap_offset) as view:
        view[at : at + len(whole)] = whole


def padded(states: list[bytes]) -> list[bytes]:
    """Return the states of a whole region: the rest is the free list, in order."""
    rest = range(len(states), SIZE)
    return states + [free(number, number + 1, states[0]) for number in rest]


def base(rig: VhostUserRig, used: int) -> int:
    """Return the ring base of a device that has taken everything and used *used* descriptors."""
    return rig.main_packed.base | (used | WRAP) << 16


@pytest.mark.requirement("vu.inflight.order", "vu.inflight.free-list", "vu.inflight.packed")
def test_packed_buffers_in_flight_are_served_again(new_rig: MakeRig) -> None:
    """Buffers in flight come back once, by their counters; a mark in the free list is stale."""
    rig, answer, fd, placed = prepared(new_rig)
    counters = [2, 0, 3, 1]
    states = entries(rig.main_packed, [one.id for one in placed], counters)
    taken = len(states)
    forge(rig, answer, fd, Crashed(taken, taken), padded(states))
    resume_from(rig, answer, fd, base(rig, 0))
    used = rig.collect(rig.main, 4)
    row = "vu.inflight.free-list"
    require(len({one.id for one in used}) == 4, "a buffer of the free list came back", row=row)
    rig.check(placed, used)
    rig.expect_quiet(0.05)
    if rig.profile.name in ("balloon", "rng"):  # others may finish requests in any order
        due = [placed[counters.index(counter)].id for counter in range(4)]
        found = [one.id for one in used]
        require(found == due, f"used in the order {found}, due is {due}", row="vu.inflight.order")
    os.close(fd)


def half_used(new_rig: MakeRig, *, shown: bool) -> None:
    """Crash after the first buffer's used index was recorded, before or after it was *shown*."""
    rig, answer, fd, placed = prepared(new_rig)
    ring = rig.main_packed
    states = entries(ring, [one.id for one in placed], range(4))
    taken, count = len(states), ring.lengths[placed[0].id]
    last = DescStatePacked.parse(states[count - 1])
    last.next = taken
    states[count - 1] = last.build()
    forge(rig, answer, fd, Crashed(0, taken, count, 0), padded(states))
    if shown:
        both = packed.VIRTQ_DESC_F_AVAIL | packed.VIRTQ_DESC_F_USED
        ring.write_slot(0, 0, 0, placed[0].id, both)
        returned = [element.id for element in ring.poll()]
        require(returned == [placed[0].id], "the suite has forged wrongly")
        ring.write_slot(0, MARK, MARK, MARK, both)  # the slot is the driver's again
    resume_from(rig, answer, fd, base(rig, count if shown else 0))
    due = {one.id for one in placed[shown:]}
    used = {element.id for element in rig.collect(ring, len(due))}
    require(used == due, f"submitted again are {used}, due is {due}")
    rig.expect_quiet(0.05)
    untouched = int(ring.desc["id"][0]) == MARK
    require(untouched or not shown, "the buffer that the driver has back is used once more")
    os.close(fd)


@pytest.mark.requirement("vu.inflight.commit")
def test_packed_buffer_that_the_driver_saw_is_not_repeated(new_rig: MakeRig) -> None:
    """A used descriptor in the ring commits the update that the crash interrupted."""
    half_used(new_rig, shown=True)


@pytest.mark.requirement("vu.inflight.rollback")
def test_packed_buffer_that_the_driver_never_saw_is_served(new_rig: MakeRig) -> None:
    """An available descriptor in the ring rolls the interrupted update back."""
    half_used(new_rig, shown=False)
