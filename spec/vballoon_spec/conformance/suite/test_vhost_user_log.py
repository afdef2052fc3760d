# SPDX-License-Identifier: Apache-2.0
"""Dirty logging against what was really written, and the inflight region."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from vballoon_spec.conformance.findings import Closed, not_applicable, require
from vballoon_spec.conformance.memory import PAGE
from vballoon_spec.conformance.rig_vhost_user import COMMON_PROTOCOL, VhostUserRig
from vballoon_spec.vhost_user.features import ProtocolFeature as P
from vballoon_spec.vhost_user.features import VhostFeature, VringFlag
from vballoon_spec.vhost_user.payloads import VhostUserInflight, VhostUserLog
from vballoon_spec.vhost_user.requests import Request

LOG_OFFSET = 2 * PAGE
LOG_SIZE = (0x4060_0000 // PAGE) // 8 + 4096
"""Bytes of log: all memory of the suite's layout, and room for a ring logged elsewhere."""
MakeRig = Callable[..., VhostUserRig]


class Log:
    """The dirty log: one bit a page, at an offset in its file, guard bytes around it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("conformance-log")
        os.ftruncate(self.fd, LOG_OFFSET + LOG_SIZE + PAGE)
        self.view = mmap.mmap(self.fd, LOG_OFFSET + LOG_SIZE + PAGE)

    def pages(self) -> set[int]:
        """Pages marked dirty."""
        raw = np.frombuffer(self.view[LOG_OFFSET : LOG_OFFSET + LOG_SIZE], np.uint8)
        bits = np.unpackbits(raw, bitorder="little")
        return {int(page) for page in np.flatnonzero(bits)}

    def clear(self) -> None:
        """Forget all marks."""
        self.view[:] = bytes(len(self.view))

    def strays(self) -> bool:
        """Whether anything was written around the log."""
        return any(self.view[:LOG_OFFSET]) or any(self.view[LOG_OFFSET + LOG_SIZE :])

    def close(self) -> None:
        """Unmap and close."""
        self.view.close()
        os.close(self.fd)


@pytest.fixture
def log() -> Iterator[Log]:
    """A dirty log."""
    made = Log()
    yield made
    made.close()


def attach(rig: VhostUserRig, log: Log) -> None:
    """SET_LOG_BASE; its reply has 0, 8 or 16 bytes with the backends that there are."""
    payload = VhostUserLog(mmap_size=LOG_SIZE, mmap_offset=LOG_OFFSET).build()
    rig.fe.send(Request.SET_LOG_BASE, payload, [log.fd])
    rig.fe.expect_reply(Request.SET_LOG_BASE)


def span_pages(addr: int, size: int) -> set[int]:
    """Pages of an address range."""
    return set(range(addr // PAGE, (addr + size - 1) // PAGE + 1)) if size else set()


def around(pages: set[int]) -> set[int]:
    """These pages and those that share a byte of the log with them.

    Where there is no atomic OR a byte of ones is the safe way to set a bit: it may report too
    much, but undoes nobody's bit.
    """
    return {page // 8 * 8 + i for page in pages for i in range(8)}


def set_ring_flags(rig: VhostUserRig, flags: int, log_addr: int = 0) -> None:
    """Tell the main ring's addresses again, with flags."""
    rig.fe.vring_addr(rig.profile.main, rig.main.areas, rig.ram, flags=flags, log=log_addr)


def run_logged(rig: VhostUserRig, log: Log, serial: int) -> tuple[set[int], set[int], set[int]]:
    """One request: pages marked, pages that had to be, pages that were allowed to be."""
    log.clear()
    placed = rig.request(serial, align=PAGE)
    (used,) = rig.run([placed])
    rig.fe.barrier()
    due = span_pages(placed.writable_at, used.len)
    may = span_pages(placed.writable_at, placed.exchange.writable)
    for start, end in placed.exchange.may_change:
        may |= span_pages(start, end - start)
    return log.pages(), due, may


@pytest.mark.requirement("vu.log.buffers", "vu.log.exact")
def test_written_buffers_are_logged(rig: VhostUserRig, log: Log) -> None:
    """Every page that the device wrote is marked, and no page that it did not."""
    rig.need_log()
    rig.bring_up()
    attach(rig, log)
    rig.reset_features(rig.features | VhostFeature.LOG_ALL)
    for serial in range(4):
        marked, due, may = run_logged(rig, log, serial)
        require(due <= marked, f"pages written and not logged: {sorted(due - marked)}")
        extra = marked - around(may)
        require(not extra, f"pages logged and not written: {sorted(extra)}")
        require(not log.strays(), "the backend wrote beside the log")


@pytest.mark.requirement("vu.log.used-ring", "vu.log.exact")
def test_used_ring_is_logged(rig: VhostUserRig, log: Log) -> None:
    """With the ring's flag its used ring is logged too; without it is not."""
    rig.need_log()
    rig.bring_up()
    attach(rig, log)
    rig.reset_features(rig.features | VhostFeature.LOG_ALL)
    low, high = rig.main.device_span[0]
    ring_pages = span_pages(low, high - low)
    set_ring_flags(rig, VringFlag.LOG, low)
    marked, due, may = run_logged(rig, log, 0)
    require(marked & ring_pages, f"the used ring is not logged; logged are {sorted(marked)}")
    require(due <= marked, f"pages written and not logged: {sorted(due - marked)}")
    extra = marked - around(may | ring_pages)
    require(not extra, f"logged too much: {sorted(extra)}")
    set_ring_flags(rig, 0)
    marked, _, _ = run_logged(rig, log, 1)
    require(not marked & ring_pages, "the used ring is logged although its flag is off")


@pytest.mark.requirement("vu.log.guest-addr")
def test_used_ring_is_logged_at_its_log_address(rig: VhostUserRig, log: Log) -> None:
    """The used ring's bits lie where log_guest_addr says, also outside guest memory."""
    rig.need_log()
    rig.bring_up()
    attach(rig, log)
    rig.reset_features(rig.features | VhostFeature.LOG_ALL)
    where = 0x4060_0000 + 4 * PAGE
    set_ring_flags(rig, VringFlag.LOG, where)
    marked, _, may = run_logged(rig, log, 0)
    expected = span_pages(where, PAGE)
    if rig.packed:  # the message speaks of split rings; descriptors may be logged where they lie
        may |= {page for low, high in rig.main.device_span for page in span_pages(low, high - low)}
    require(marked & expected, f"nothing is logged at {where:#x}; logged are {sorted(marked)}")
    extra = marked - around(may | expected)
    require(not extra, f"logged elsewhere too: {sorted(extra)}")


@pytest.mark.requirement("vu.log.off", "vu.features.live")
def test_logging_off_and_on(rig: VhostUserRig, log: Log) -> None:
    """Nothing is marked without LOG_ALL; it can be switched while rings run."""
    rig.need_log()
    rig.bring_up()
    attach(rig, log)
    for serial in range(6):
        on = serial % 2 == 1
        rig.reset_features(rig.features | (VhostFeature.LOG_ALL if on else 0))
        marked, due, _ = run_logged(rig, log, serial)
        if on:
            require(due <= marked, "pages written and not logged after switching on")
        else:
            require(not marked, f"pages {sorted(marked)} are logged although LOG_ALL is off")


@pytest.mark.requirement("vu.log.stopped-final")
def test_log_rests_when_stopped(rig: VhostUserRig, log: Log) -> None:
    """After all rings are stopped the log does not change any more."""
    rig.need_log()
    rig.bring_up()
    attach(rig, log)
    rig.reset_features(rig.features | VhostFeature.LOG_ALL)
    placed = [rig.submit(rig.request(serial)) for serial in range(8)]
    rig.main.publish()
    rig.kick(rig.profile.main)
    for index in rig.rings:
        rig.stop_ring(index)
    marked, before = log.pages(), rig.ram.picture()
    rig.main_quiet(0.1)
    require(log.pages() == marked, "the log changes after the rings were stopped")
    rig.ram.expect_untouched(before)
    require(placed, "the suite did not submit")


@pytest.mark.requirement("vu.robust.log-base")
@pytest.mark.parametrize(
    ("size", "offset"),
    [(0, 0), (1 << 63, 1 << 63), (1 << 40, 0), (4096, (1 << 64) - 4096), (8, 0), (4096, 1 << 40)],
    ids=["empty", "overflow", "huge", "wrap", "small", "far"],
)
def test_log_that_makes_no_sense(rig: VhostUserRig, log: Log, size: int, offset: int) -> None:
    """Logs that overflow, lie beyond their file or are too small do no harm."""
    rig.need_log()
    rig.bring_up()
    payload = VhostUserLog(mmap_size=size, mmap_offset=offset).build()
    try:
        rig.fe.send(Request.SET_LOG_BASE, payload, [log.fd])
        rig.fe.expect_reply(Request.SET_LOG_BASE)
        rig.reset_features(rig.features | VhostFeature.LOG_ALL)
        rig.submit(rig.request(0, region=2))
        rig.main.publish()
        rig.kick(rig.profile.main)
        rig.main_quiet(0.1)
    except AssertionError:
        pass
    rig.survive(spinning=True)


# -- inflight --------------------------------------------------------------------------------

INFLIGHT = COMMON_PROTOCOL | P.INFLIGHT_SHMFD
SIZE = 16


def inflight_region(rig: VhostUserRig, queues: int = 0) -> tuple[VhostUserInflight, int]:
    """GET_INFLIGHT_FD for all queues of the profile."""
    count = queues or max(rig.profile.queues, default=0) + 1
    request = VhostUserInflight(mmap_size=0, mmap_offset=0, num_queues=count, queue_size=SIZE)
    reply = rig.fe.ask(Request.GET_INFLIGHT_FD, request.build())
    require(len(reply.fds) == 1, f"GET_INFLIGHT_FD brings {len(reply.fds)} descriptors")
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
    """GET_INFLIGHT_FD brings a region of a plausible size that holds nothing."""
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
    """SET_INFLIGHT_FD, then all rings."""
    rig.fe.do(Request.SET_INFLIGHT_FD, answer.build(), [fd])
    for index in rig.profile.queues:
        rig.start_ring(index, rig.rings.get(index) or rig.make_ring(SIZE))
    rig.driver_ok()


@pytest.mark.requirement("vu.inflight.split", "vu.inflight.packed")
def test_inflight_region_after_work(rig: VhostUserRig) -> None:
    """When all buffers are back, none is marked; the used index is the ring's."""
    need_inflight(rig)
    answer, fd = inflight_region(rig)
    start_with(rig, answer, fd)
    rig.profile.prepare(rig)
    for serial in range(5):
        rig.run([rig.profile.exchange(rig, serial)])
    rig.fe.barrier()
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
        require(used == due, f"used_idx {used}, the ring says {due}")
    require(version == 1, f"region version {version}")
    require(number == SIZE, f"desc_num {number}, queue size {SIZE}")
    require(not any(marks), "buffers are marked as inflight although all are back")
    os.close(fd)


@pytest.mark.requirement("vu.inflight.resubmit", "vu.reconnect")
def test_inflight_buffers_are_served_after_a_crash(new_rig: MakeRig) -> None:
    """Buffers that a crashed backend had taken are served once, those used are not again."""
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
    """Write a split region as a backend leaves it that crashed after taking *heads*."""
    per = answer.mmap_size // (max(rig.profile.queues) + 1)
    at = answer.mmap_offset + per * rig.profile.main
    with mmap.mmap(fd, answer.mmap_size + answer.mmap_offset) as view:
        struct.pack_into("<QHHHH", view, at, 0, 1, SIZE, 0, 0)
        for counter, head in enumerate(heads):
            struct.pack_into("<B5xHQ", view, at + 16 + 16 * head, 1, 0, counter)


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
        for index in rig.profile.queues:
            rig.start_ring(index, rig.make_ring(SIZE))
        rig.driver_ok()
        rig.submit(rig.request())
        rig.main.publish()
        rig.kick(rig.profile.main)
        rig.main_quiet(0.1)
    except (Closed, AssertionError):
        pass
    os.close(fd)
    rig.survive(spinning=True)
