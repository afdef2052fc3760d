# SPDX-License-Identifier: Apache-2.0
"""Dirty logging against what was really written."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from virtio_conformance.dirty_log import Log
from virtio_conformance.findings import require
from virtio_conformance.memory import PAGE
from virtio_conformance.rig_vhost_user import VhostUserRig
from virtio_formats.vhost_user.features import VhostFeature, VringFlag
from virtio_formats.vhost_user.payloads import VhostUserLog
from virtio_formats.vhost_user.requests import Request

MakeRig = Callable[..., VhostUserRig]


@pytest.fixture
def log() -> Iterator[Log]:
    """Return a dirty log."""
    made = Log()
    yield made
    made.close()


def span_pages(addr: int, size: int) -> set[int]:
    """Return the page numbers of an address range."""
    return set(range(addr // PAGE, (addr + size - 1) // PAGE + 1)) if size else set()


def set_ring_flags(rig: VhostUserRig, flags: int, log_addr: int = 0) -> None:
    """Tell the main ring's addresses again, with flags."""
    rig.fe.vring_addr(rig.profile.main, rig.main.areas, rig.ram, flags=flags, log=log_addr)


def run_logged(rig: VhostUserRig, log: Log, serial: int) -> tuple[set[int], set[int], set[int]]:
    """Run one request; return the pages marked, those required, and those allowed."""
    log.clear()
    if serial % 2:  # up to a page's end, or over it
        rig.ram.alloc(PAGE - 64, PAGE, 1)
    placed = rig.request(serial, align=1 if serial % 2 else PAGE)
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
    log.attach(rig)
    rig.reset_features(rig.features | VhostFeature.LOG_ALL)
    for serial in range(4):
        marked, due, may = run_logged(rig, log, serial)
        require(due <= marked, f"pages written and not logged: {sorted(due - marked)}")
        require(not log.strays(), "the back-end wrote beside the log", row="vu.robust.log-base")
        extra = marked - may
        told = f"pages logged and not written: {sorted(extra)}"
        require(not extra, told, row="vu.log.exact")


@pytest.mark.requirement("vu.log.used-ring", "vu.log.exact")
def test_used_ring_is_logged(rig: VhostUserRig, log: Log) -> None:
    """With the ring's flag its used ring is logged too; without it is not."""
    rig.need_log()
    rig.bring_up()
    log.attach(rig)
    rig.reset_features(rig.features | VhostFeature.LOG_ALL)
    low, high = rig.main.device_span[0]
    ring_pages = span_pages(low, high - low)
    set_ring_flags(rig, VringFlag.LOG, low)
    marked, due, may = run_logged(rig, log, 0)
    require(marked & ring_pages, f"the used ring is not logged; logged are {sorted(marked)}")
    told = f"pages written and not logged: {sorted(due - marked)}"
    require(due <= marked, told, row="vu.log.buffers")
    extra = marked - (may | ring_pages)
    set_ring_flags(rig, 0)
    marked, _, _ = run_logged(rig, log, 1)
    require(not marked & ring_pages, "the used ring is logged although its flag is off")
    require(not extra, f"logged too much: {sorted(extra)}", row="vu.log.exact")


@pytest.mark.requirement("vu.log.guest-addr", "vu.log.exact")
def test_used_ring_is_logged_at_its_log_address(rig: VhostUserRig, log: Log) -> None:
    """The used ring's bits lie where log_guest_addr says, also outside guest memory."""
    rig.need_log()
    rig.bring_up()
    log.attach(rig)
    rig.reset_features(rig.features | VhostFeature.LOG_ALL)
    where = 0x1_4020_0000 + 4 * PAGE
    set_ring_flags(rig, VringFlag.LOG, where)
    marked, _, may = run_logged(rig, log, 0)
    expected = span_pages(where, PAGE)
    if rig.packed:  # the message speaks of split rings; descriptors may be logged where they lie
        may |= {page for low, high in rig.main.device_span for page in span_pages(low, high - low)}
    require(marked & expected, f"nothing is logged at {where:#x}; logged are {sorted(marked)}")
    extra = marked - (may | expected)
    require(not extra, f"logged elsewhere too: {sorted(extra)}", row="vu.log.exact")


@pytest.mark.requirement("vu.log.off", "vu.log.buffers")
def test_logging_off_and_on(rig: VhostUserRig, log: Log) -> None:
    """Nothing is marked without LOG_ALL, not even the used ring; it can be switched at any time."""
    rig.need_log()
    rig.bring_up()
    log.attach(rig)
    low, high = rig.main.device_span[0]
    set_ring_flags(rig, VringFlag.LOG, low)
    for serial in range(6):
        on = serial % 2 == 1
        rig.reset_features(rig.features | (VhostFeature.LOG_ALL if on else 0))
        marked, due, _ = run_logged(rig, log, serial)
        if on:
            due |= marked & span_pages(low, high - low) or {low // PAGE}
            told = "pages written and not logged after switching on"
            require(due <= marked, told, row="vu.log.buffers")
        else:
            require(not marked, f"pages {sorted(marked)} are logged although LOG_ALL is off")


@pytest.mark.requirement("vu.log.stopped-final")
def test_log_rests_when_stopped(rig: VhostUserRig, log: Log) -> None:
    """After all rings are stopped the log does not change any more."""
    rig.need_log()
    rig.bring_up()
    log.attach(rig)
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
