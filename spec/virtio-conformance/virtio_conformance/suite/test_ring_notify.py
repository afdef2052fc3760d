# SPDX-License-Identifier: Apache-2.0
"""Notifications in both directions: sent when due, not sent when unwanted, never lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from virtio_conformance.findings import not_applicable, preparing, require
from virtio_conformance.rig import Rig
from virtio_conformance.ring import Used
from virtio_formats.virtio.features import VIRTIO_F_EVENT_IDX, has
from virtio_formats.virtio.packed import EVENT_FLAGS_MASK, RING_EVENT_FLAGS_DESC

QUIET = 0.06
"""Seconds after a used buffer in which a notification that is not due would have come."""


def one(rig: Rig, serial: int) -> None:
    """Put one request through the main ring; without it, notifications prove nothing."""
    with preparing():
        rig.run([rig.profile.exchange(rig, serial)], watch=False)


def signals(rig: Rig, limit: float = QUIET) -> int:
    """Return the pending notifications of the main ring, after a short wait."""
    return rig.calls[rig.profile.main].wait(limit)


@pytest.mark.requirement("split.used-notify.flag-clear", "packed.event.enable")
def test_notified_when_wanted(rig: Rig) -> None:
    """With notifications on, each used buffer is followed by one."""
    ring = rig.bring_up()
    for serial in range(5):
        ring.interrupts("on")
        signals(rig, 0)
        one(rig, serial)
        require(signals(rig, 2.0), "no notification for a used buffer")


@pytest.mark.requirement("split.used-notify.flag-set", "packed.event.disable")
def test_silent_when_unwanted(rig: Rig) -> None:
    """With notifications off, none comes."""
    ring = rig.bring_up()
    ring.interrupts("off")
    signals(rig)
    for serial in range(4):
        one(rig, serial)
    require(not signals(rig), "a notification although the driver wants none")
    ring.interrupts("on")
    one(rig, 9)
    row = rig.ring_row("used-notify.flag-clear", "event.enable")
    require(signals(rig, 2.0), "no notification after they were wanted again", row=row)


@pytest.mark.requirement("split.used-notify.event-ignored")
@pytest.mark.parametrize("event", [0, 1, 0x7FFF, 0xFFFF])
def test_used_event_without_event_idx(split_rig: Rig, event: int) -> None:
    """Without EVENT_IDX the word after the available ring has no meaning."""
    rig = split_rig
    rig.bring_up()
    ring = rig.main_split
    ring.set_used_event(event)
    for serial in range(3):
        one(rig, serial)
        require(signals(rig, 2.0), f"used_event {event:#x} keeps a notification back")
    ring.set_avail_flags(1)
    signals(rig)
    ring.set_used_event(ring.last_used)
    one(rig, 3)
    require(not signals(rig), "used_event brings a notification although the flag is 1")


@pytest.mark.requirement("split.used-notify.flag-ignored")
def test_flag_with_event_idx(split_rig: Rig) -> None:
    """With EVENT_IDX the available ring's flag means nothing."""
    rig = split_rig
    rig.bring_up(VIRTIO_F_EVENT_IDX)
    ring = rig.main_split
    ring.set_avail_flags(1)
    for serial in range(3):
        ring.set_used_event(ring.last_used)
        signals(rig, 0)
        one(rig, serial)
        require(signals(rig, 2.0), "the flag keeps a notification back that used_event wants")


@pytest.mark.requirement(
    "split.used-notify.event-hit",
    "split.used-notify.event-miss",
    "packed.event.desc-hit",
    "packed.event.desc-miss",
)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_event_index(rig: Rig, after: int) -> None:
    """With EVENT_IDX the notification comes at the named buffer, not before it."""
    ring = rig.bring_up(VIRTIO_F_EVENT_IDX, size=16)
    step = len(rig.request().segments) if rig.packed else 1
    early = rig.ring_row("used-notify.event-miss", "event.desc-miss")
    due = rig.ring_row("used-notify.event-hit", "event.desc-hit")
    one(rig, 99)
    for turn in range(8):
        ring.interrupts("event", after * step)
        signals(rig, 0.01)
        for serial in range(after):
            one(rig, 4 * turn + serial)
            told = f"notified {after - serial} buffers too early"
            require(not signals(rig, 0.02), told, row=early)
        one(rig, 4 * turn + after)
        told = f"no notification at the named buffer, turn {turn}"
        require(signals(rig, 2.0), told, row=due)


@pytest.mark.requirement("split.used-notify.event-miss", "packed.event.desc-miss")
def test_event_index_on_the_first_buffer(rig: Rig) -> None:
    """The first buffer after a start is no exception: not named, not notified."""
    ring = rig.bring_up(VIRTIO_F_EVENT_IDX, size=16)
    if rig.profile.name == "fs":
        not_applicable("the first request of this device has been used to open it")
    ring.interrupts("event", 4)
    one(rig, 0)
    require(not signals(rig), "a notification for a buffer before the named one")


@pytest.mark.requirement("split.used-notify.event-hit", "packed.event.desc-hit")
def test_event_index_passed_by_a_batch(rig: Rig) -> None:
    """A batch that passes the named index in its middle is notified."""
    ring = rig.bring_up(VIRTIO_F_EVENT_IDX, size=16)
    step = len(rig.request().segments) if rig.packed else 1
    for turn in range(12):
        ring.interrupts("event", 3 * step)
        signals(rig, 0.01)
        rig.run([rig.profile.exchange(rig, 8 * turn + i) for i in range(6)], watch=False)
        require(signals(rig, 2.0), "no notification for a batch that passes the index")


@pytest.mark.requirement("split.used-notify.event-hit")
def test_event_index_past_65535(split_rig: Rig) -> None:
    """The comparison with used_event is modulo 65536."""
    rig = split_rig
    rig.need(VIRTIO_F_EVENT_IDX, "EVENT_IDX")
    if not rig.can_stop or not rig.profile.has_requests:
        not_applicable("needs a split ring over vhost-user and a device profile")
    rig.negotiate((1 << 32 | 1 << VIRTIO_F_EVENT_IDX | rig.profile.features) & rig.offered)
    for index in rig.profile.queues:
        ring = rig.make_ring(16, start=65530)
        rig.start_ring(index, ring, base=65530)
    rig.driver_ok()
    rig.profile.prepare(rig)
    one(rig, 99)
    for turn in range(6):
        rig.main.interrupts("event", 1)
        signals(rig, 0.01)
        one(rig, 2 * turn)
        told = f"notified too early, turn {turn}"
        require(not signals(rig, 0.02), told, row="split.used-notify.event-miss")
        one(rig, 2 * turn + 1)
        require(signals(rig, 2.0), f"no notification around 65535, turn {turn}")


@pytest.mark.requirement("split.avail-notify.spurious", "packed.avail-notify.spurious")
def test_spurious_kicks(rig: Rig) -> None:
    """Notifications without buffers do no harm, however many."""
    rig.bring_up()
    before = rig.ram.picture()
    for _ in range(50):
        rig.kick(rig.profile.main)
    rig.expect_quiet(0.05)
    rig.ram.expect_untouched(before, rig.allowed())
    one(rig, 0)


@pytest.mark.requirement("split.avail-notify.flags-values", "split.avail-notify.flags-zero")
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_used_flags(split_rig: Rig, event_idx: bool) -> None:
    """The used ring's flags are 0 or 1; with EVENT_IDX they are 0."""
    rig = split_rig
    rig.bring_up(*[VIRTIO_F_EVENT_IDX] * event_idx)
    ring = rig.main_split
    for serial in range(20):
        one(rig, serial)
        flags = ring.used_flags
        row = f"split.avail-notify.flags-{'zero' if event_idx else 'values'}"
        require(flags in ((0,) if event_idx else (0, 1)), f"used flags {flags:#x}", row=row)


@pytest.mark.requirement("packed.event.device-values")
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_device_event_values(new_rig: Callable[..., Rig], event_idx: bool) -> None:
    """The device's suppression structure holds defined values."""
    rig = new_rig(True)
    rig.bring_up(*[VIRTIO_F_EVENT_IDX] * event_idx)
    ring = rig.main_packed
    for serial in range(20):
        one(rig, serial)
        flags = int(ring.device_event[1])
        top = RING_EVENT_FLAGS_DESC if event_idx else 1
        require(flags & EVENT_FLAGS_MASK <= top, f"device event flags {flags:#x}")
        require(not flags & ~EVENT_FLAGS_MASK, f"reserved bits in device event flags {flags:#x}")


@pytest.mark.requirement("split.avail-notify.not-lost", "packed.event.not-lost")
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_kicks_only_when_asked_for(rig: Rig, event_idx: bool) -> None:
    """A driver that kicks only when the device asks for it gets every buffer back."""
    if event_idx:
        rig.need(VIRTIO_F_EVENT_IDX, "EVENT_IDX")
    ring = rig.bring_up(*[VIRTIO_F_EVENT_IDX] * event_idx, size=64)
    require(has(rig.features, VIRTIO_F_EVENT_IDX) == event_idx, "the suite negotiated wrongly")
    dice = random.Random(6)
    per = len(rig.request().segments)
    requests = [rig.request(i) for i in range(16)]
    due = 0
    for turn in range(150):
        for _ in range(dice.randint(1, 4)):
            if (ring.outstanding + 1) * per > ring.size:
                break
            rig.submit(requests[due % 16])
            due += 1
        ring.publish()
        if ring.wants_kick():
            rig.kick(rig.profile.main)
        if turn % dice.randint(1, 5) == 0 or ring.outstanding * per > ring.size // 2:
            rig.collect(ring, ring.outstanding)
        else:
            ring.poll()
    rig.collect(ring, ring.outstanding)


@pytest.mark.requirement("split.avail-notify.not-lost", "packed.event.not-lost")
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_buffers_that_come_as_the_device_goes_to_rest(rig: Rig, event_idx: bool) -> None:
    """A buffer made available at any moment of the device's work is served without a lost kick."""
    if event_idx:
        rig.need(VIRTIO_F_EVENT_IDX, "EVENT_IDX")
    ring = rig.bring_up(*[VIRTIO_F_EVENT_IDX] * event_idx, size=16)
    first, second = rig.request(0), rig.request(1)
    begin = time.perf_counter()
    rig.run([first], watch=False)
    span = 1.5 * (time.perf_counter() - begin)  # how long a request takes, and then some
    end = time.perf_counter() + 1.0
    for turn in range(400):
        if time.perf_counter() > end:
            break
        for placed, pause in ((first, span * (turn * 37 % 100) / 100), (second, 0.0)):
            rig.submit(placed)
            ring.publish()
            if ring.wants_kick():
                rig.kick(rig.profile.main)
            until = time.perf_counter() + pause
            while time.perf_counter() < until:
                pass
        rig.collect(ring, 2)


@pytest.mark.requirement("split.used.len-first", "packed.desc.used-final")
def test_elements_are_complete_when_they_show(rig: Rig) -> None:
    """Used elements have their id and length at the moment when the used index shows them."""
    ring = rig.bring_up(size=8)
    placed = rig.request()
    (expected,) = rig.run([placed], watch=False)
    for _ in range(60):
        if not rig.packed:
            rig.main_split.elements["id"] = 0xFFFFFFFF
            rig.main_split.elements["len"] = 0xFFFFFFFF
        rig.submit(placed)
        ring.publish()
        rig.kick(rig.profile.main)
        found: list[Used] = []
        for _ in range(20_000):
            found = list(ring.poll())
            if found:
                break
        (element,) = found or rig.collect(ring, 1)
        require(element.len == expected.len, f"length {element.len}, due is {expected.len}")
