# SPDX-License-Identifier: Apache-2.0
"""The inflight region: what a back-end records, and how the next one resubmits it."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable

import pytest

from virtio_conformance.findings import Closed, not_applicable, preparing, require
from virtio_conformance.rig import Placed
from virtio_conformance.rig_vhost_user import COMMON_PROTOCOL, VhostUserRig
from virtio_formats.vhost_user.features import ProtocolFeature as P
from virtio_formats.vhost_user.payloads import VhostUserInflight
from virtio_formats.vhost_user.requests import Request

MakeRig = Callable[..., VhostUserRig]
INFLIGHT = COMMON_PROTOCOL | P.INFLIGHT_SHMFD
SIZE = 16


def inflight_region(rig: VhostUserRig, queues: int = 0) -> tuple[VhostUserInflight, int]:
    """Return the reply to GET_INFLIGHT_FD for all queues of the profile."""
    count = queues or max(rig.profile.queues, default=0) + 1
    request = VhostUserInflight(mmap_size=0, mmap_offset=0, num_queues=count, queue_size=SIZE)
    reply = rig.fe.ask(Request.GET_INFLIGHT_FD, request.build())
    require(len(reply.fds) == 1, f"GET_INFLIGHT_FD returns {len(reply.fds)} descriptors")
    raw = reply.payload.ljust(VhostUserInflight.SIZE, b"\0")
    return VhostUserInflight.parse(raw), reply.fds[0]


def need_inflight(rig: VhostUserRig) -> None:
    """Negotiate with the inflight region."""
    rig.need_protocol(P.INFLIGHT_SHMFD)
    if not rig.profile.has_requests:
        not_applicable("no device profile, so no valid request is known")
    rig.protocol = INFLIGHT
    packed = 1 << 34 if rig.packed else 0
    rig.negotiate((1 << 32 | packed | rig.profile.features) & rig.offered)


@pytest.mark.requirement("vu.inflight.get")
def test_inflight_region_is_fresh(rig: VhostUserRig) -> None:
    """GET_INFLIGHT_FD returns an empty region of a plausible size."""
    need_inflight(rig)
    answer, fd = inflight_region(rig)
    due = 16 * SIZE * (max(rig.profile.queues) + 1)
    require(due <= answer.mmap_size <= 1 << 24, f"a region of {answer.mmap_size} bytes")
    with mmap.mmap(fd, answer.mmap_size + answer.mmap_offset) as view:
        data = view[answer.mmap_offset :]
    per = answer.mmap_size // (max(rig.profile.queues) + 1)
    header = 32 if rig.packed else 16
    step = 32 if rig.packed else 16
    for queue in range(max(rig.profile.queues) + 1):
        marks = data[queue * per + header : queue * per + header + SIZE * step : step]
        require(not any(marks), f"a fresh region marks buffers of queue {queue} as inflight")
    os.close(fd)


def start_with(rig: VhostUserRig, answer: VhostUserInflight, fd: int) -> None:
    """Send SET_INFLIGHT_FD, then start all rings."""
    rig.fe.do(Request.SET_INFLIGHT_FD, answer.build(), [fd])
    for index in rig.profile.queues:
        rig.start_ring(index, rig.rings.get(index) or rig.make_ring(SIZE))
    rig.driver_ok()


@pytest.mark.requirement("vu.inflight.split", "vu.inflight.packed")
def test_inflight_region_after_work(rig: VhostUserRig) -> None:
    """When all buffers are back, none is marked; the used index is the ring's."""
    need_inflight(rig)
    answer, fd = inflight_region(rig)
    with preparing():
        start_with(rig, answer, fd)
        rig.profile.prepare(rig)
        for serial in range(5):
            rig.run([rig.profile.exchange(rig, serial)])
        rig.fe.barrier()
    row = f"vu.inflight.{'packed' if rig.packed else 'split'}"
    count = max(rig.profile.queues) + 1
    with mmap.mmap(fd, answer.mmap_size + answer.mmap_offset) as view:
        data = view[answer.mmap_offset :]
    at = answer.mmap_size // count * rig.profile.main
    if rig.packed:
        version, number = struct.unpack_from("<HH", data, at + 8)
        marks = data[at + 32 : at + 32 + 32 * SIZE : 32]
    else:
        version, number, _, used = struct.unpack_from("<HHHH", data, at + 8)
        marks = data[at + 16 : at + 16 + 16 * SIZE : 16]
        due = rig.main_split.used_idx
        require(used == due, f"used_idx {used}, the ring says {due}", row=row)
    require(version == 1, f"region version {version}", row=row)
    require(number == SIZE, f"desc_num {number}, queue size {SIZE}", row=row)
    require(not any(marks), "buffers are marked as inflight although all are back", row=row)
    os.close(fd)


@pytest.mark.requirement("vu.inflight.resubmit", "vu.reconnect")
def test_inflight_buffers_are_served_after_a_crash(new_rig: MakeRig) -> None:
    """Buffers that a crashed back-end had taken are served once; used ones are not repeated."""
    rig = new_rig(False)
    need_inflight(rig)
    if rig.profile.name == "fs":
        not_applicable("requests of this device need one before them on each connection")
    answer, fd = inflight_region(rig)
    ring = rig.make_ring(SIZE)
    for index in rig.profile.queues:
        rig.rings[index] = ring if index == rig.profile.main else rig.make_ring(SIZE)
    placed = [rig.submit(rig.request(serial)) for serial in range(4)]
    ring.publish()
    forge(rig, answer, fd, [one.id for one in placed[:3]])
    rig.fe.do(Request.SET_INFLIGHT_FD, answer.build(), [fd])
    for index in rig.profile.queues:
        rig.start_ring(index, rig.rings[index], base=3 if index == rig.profile.main else 0)
    rig.driver_ok()
    rig.kick(rig.profile.main)
    rig.check(placed, rig.collect(ring, 4))
    rig.expect_quiet(0.05)
    os.close(fd)


def forge(rig: VhostUserRig, answer: VhostUserInflight, fd: int, heads: list[int]) -> None:
    """Write the split region of a back-end that crashed after taking *heads*."""
    per = answer.mmap_size // (max(rig.profile.queues) + 1)
    at = answer.mmap_offset + per * rig.profile.main
    with mmap.mmap(fd, answer.mmap_size + answer.mmap_offset) as view:
        struct.pack_into("<QHHHH", view, at, 0, 1, SIZE, 0, 0)
        for counter, head in enumerate(heads):
            struct.pack_into("<B5xHQ", view, at + 16 + 16 * head, 1, 0, counter)


def one_request(rig: VhostUserRig) -> None:
    """Start all rings and send a request, whatever comes of it."""
    for index in rig.profile.queues:
        rig.start_ring(index, rig.make_ring(SIZE))
    rig.driver_ok()
    rig.submit(rig.request())
    rig.main.publish()
    rig.kick(rig.profile.main)
    rig.main_quiet(0.1)


@pytest.mark.requirement("vu.robust.inflight")
def test_inflight_region_never_set(rig: VhostUserRig) -> None:
    """INFLIGHT_SHMFD without a region: rings are served or refused, without harm."""
    need_inflight(rig)
    try:
        one_request(rig)
    except Closed:
        pass
    rig.survive(spinning=True)


@pytest.mark.requirement("vu.robust.inflight")
@pytest.mark.parametrize("what", ["counts", "size", "offset", "no-fd", "short-file"])
def test_inflight_that_makes_no_sense(split_rig: VhostUserRig, what: str) -> None:
    """Absurd inflight descriptions are refused or harmless."""
    rig = split_rig
    need_inflight(rig)
    values = {"mmap_size": 4096, "mmap_offset": 0, "num_queues": 2, "queue_size": SIZE}
    values |= {
        "counts": {"num_queues": 0xFFFF, "queue_size": 0xFFFF},
        "size": {"mmap_size": (1 << 64) - 1},
        "offset": {"mmap_offset": (1 << 64) - 4096},
    }.get(what, {})
    fd = os.memfd_create("conformance-inflight")
    os.ftruncate(fd, 16 if what == "short-file" else 4096)
    message = VhostUserInflight(**values).build()
    try:
        if what == "counts":
            rig.fe.send(Request.GET_INFLIGHT_FD, message)
            for got in rig.fe.receive().fds:
                os.close(got)
        rig.fe.attempt(Request.SET_INFLIGHT_FD, message, [] if what == "no-fd" else [fd])
        one_request(rig)
    except (Closed, AssertionError):
        pass
    os.close(fd)
    rig.survive(spinning=True)


def resume_from(rig: VhostUserRig, answer: VhostUserInflight, fd: int, base: int) -> None:
    """Hand over a region and start the rings, the main one at *base*."""
    rig.fe.do(Request.SET_INFLIGHT_FD, answer.build(), [fd])
    for index in rig.profile.queues:
        rig.start_ring(index, rig.rings[index], base=base if index == rig.profile.main else 0)
    rig.driver_ok()
    rig.kick(rig.profile.main)


def prepared(rig: VhostUserRig, count: int) -> tuple[VhostUserInflight, int, list[Placed]]:
    """Return a new region, rings that are not started, and requests in the main one."""
    need_inflight(rig)
    if rig.profile.name == "fs":
        not_applicable("requests of this device need one before them on each connection")
    answer, fd = inflight_region(rig)
    for index in rig.profile.queues:
        rig.rings[index] = rig.make_ring(SIZE)
    placed = [rig.submit(rig.request(serial)) for serial in range(count)]
    rig.main.publish()
    return answer, fd, placed


@pytest.mark.requirement("vu.inflight.order")
def test_inflight_buffers_in_the_order_of_their_counters(new_rig: MakeRig) -> None:
    """Buffers are submitted again by their counters, whatever their heads are."""
    rig = new_rig(False)
    answer, fd, placed = prepared(rig, 4)
    heads = [placed[i].id for i in (2, 0, 3, 1)]
    forge(rig, answer, fd, heads)
    if rig.profile.name not in ("balloon", "rng"):
        not_applicable("this device may finish requests in another order than it starts them")
    resume_from(rig, answer, fd, base=4)
    used = [element.id for element in rig.collect(rig.main, 4)]
    require(used == heads, f"used in the order {used}, due is {heads}")
    os.close(fd)


@pytest.mark.requirement("vu.inflight.batch", "vu.inflight.resubmit")
def test_inflight_batch_that_was_used_already(new_rig: MakeRig) -> None:
    """After a crash between used index and in-flight marks, the batch list decides."""
    rig = new_rig(False)
    answer, fd, placed = prepared(rig, 4)
    ring = rig.main_split
    heads = [one.id for one in placed]
    for slot, head in enumerate(heads[:2]):  # used by the back-end that crashed
        ring.elements[slot] = (head, 0)
    ring.used_words[1] = 2
    forge(rig, answer, fd, heads)
    per = answer.mmap_size // (max(rig.profile.queues) + 1)
    at = answer.mmap_offset + per * rig.profile.main
    with mmap.mmap(fd, answer.mmap_size + answer.mmap_offset) as view:
        struct.pack_into("<HH", view, at + 12, heads[1], 0)  # last_batch_head, used_idx
        struct.pack_into("<H", view, at + 16 + 16 * heads[1] + 6, heads[0])
    returned = [element.id for element in ring.poll()]
    require(returned == heads[:2], "the suite has forged wrongly")
    resume_from(rig, answer, fd, base=4)
    used = {element.id for element in rig.collect(ring, 2)}
    require(used == set(heads[2:]), f"submitted again are {used}, due is {set(heads[2:])}")
    rig.expect_quiet(0.05)
    os.close(fd)


@pytest.mark.requirement("vu.inflight.split")
def test_inflight_counters_rise(new_rig: MakeRig) -> None:
    """Each buffer that is taken gets the next value of one counter for the queue."""
    rig = new_rig(False)
    answer, fd, placed = prepared(rig, 6)
    resume_from(rig, answer, fd, base=0)
    rig.check(placed, rig.collect(rig.main, len(placed)))
    rig.fe.barrier()
    per = answer.mmap_size // (max(rig.profile.queues) + 1)
    at = answer.mmap_offset + per * rig.profile.main
    with mmap.mmap(fd, answer.mmap_size + answer.mmap_offset) as view:
        found = [struct.unpack_from("<Q", view, at + 16 + 16 * one.id + 8)[0] for one in placed]
    require(found == sorted(set(found)), f"counters {found} of buffers taken one after the other")
    os.close(fd)
