# SPDX-License-Identifier: Apache-2.0
"""Event indices that are stale or of another round, the smallest queues, and odd buffer ids."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from virtio_conformance.findings import not_applicable, preparing, require
from virtio_conformance.rig import Rig
from virtio_conformance.ring_packed import AVAIL, USED, WRITE
from virtio_formats.virtio.features import VIRTIO_F_EVENT_IDX
from virtio_formats.virtio.packed import EVENT_WRAP_SHIFT, RING_EVENT_FLAGS_DESC

QUIET = 0.05
"""Seconds after a used buffer in which a notification that is not due would have come."""


def one(rig: Rig, serial: int) -> None:
    """Put one request through the main ring; without it, notifications prove nothing."""
    with preparing():
        rig.run([rig.profile.exchange(rig, serial)], watch=False)


def notified(rig: Rig, limit: float = QUIET) -> int:
    """Return the pending notifications of the main ring, after a short wait."""
    return rig.calls[rig.profile.main].wait(limit)


@pytest.mark.requirement("split.used-notify.event-miss")
def test_stale_event_index(split_rig: Rig) -> None:
    """A used_event that was passed before brings no further notification."""
    rig = split_rig
    rig.bring_up(VIRTIO_F_EVENT_IDX, size=16)
    one(rig, 0)
    ring = rig.main_split
    ring.set_used_event(ring.last_used)
    notified(rig, 0.01)
    one(rig, 1)
    hit = "split.used-notify.event-hit"
    require(notified(rig, 2.0), "no notification at the named buffer", row=hit)
    for serial in range(2, 7):
        one(rig, serial)
        told = f"a notification for buffer {serial - 1} after the named one"
        require(not notified(rig), told)
    ring.set_used_event(ring.last_used - 5)
    one(rig, 7)
    require(not notified(rig), "a notification although used_event was passed long ago")


@pytest.mark.requirement("packed.event.desc-miss", "packed.event.desc-hit")
def test_event_of_the_other_round(new_rig: Callable[..., Rig]) -> None:
    """The wrap bit of the event counts: the same slot in the other round is not meant."""
    rig = new_rig(True)
    rig.bring_up(VIRTIO_F_EVENT_IDX, size=8)
    one(rig, 0)
    ring = rig.main_packed
    step = len(rig.request().segments)
    if ring.size % step:
        not_applicable(f"requests of {step} descriptors do not come back to the same slot")
    slot, other = ring.used_slot, ring.used_wrap ^ 1
    ring.driver_event[0] = slot | other << EVENT_WRAP_SHIFT
    ring.driver_event[1] = RING_EVENT_FLAGS_DESC
    notified(rig, 0.01)
    for serial in range(ring.size // step):
        one(rig, 1 + serial)
        require(not notified(rig), f"notified {serial} buffers into the round before the named one")
    one(rig, 99)
    hit = "packed.event.desc-hit"
    require(notified(rig, 2.0), "no notification at the named slot of the named round", row=hit)


@pytest.mark.requirement("split.used.index-wrap", "packed.wrap")
def test_queue_of_one_descriptor(rig: Rig) -> None:
    """A queue of a single descriptor serves one request after the other."""
    if len(rig.profile.exchange(rig, 0).readable) and rig.profile.writes:
        not_applicable("a request needs two descriptors")
    with preparing():
        rig.bring_up(size=1)
    for serial in range(6):
        rig.run([rig.profile.exchange(rig, serial)])


@pytest.mark.requirement("ring.packed-id", "packed.used.id")
@pytest.mark.parametrize("name", [16, 17, 0x7FFF, 0xFFFF], ids=hex)
def test_buffer_id_beyond_the_queue(new_rig: Callable[..., Rig], name: int) -> None:
    """A buffer with an id at or above the queue size comes back with that id, or not at all."""
    rig = new_rig(True)
    rig.bring_up(size=16)
    ring = rig.main_packed
    placed = rig.request(0)
    if len(placed.segments) != 1:
        not_applicable("a request needs several descriptors")
    (only,) = placed.segments
    before = rig.ram.picture()
    flags = ring.available(ring.wrap) | (WRITE if only.write else 0)
    ring.write_slot(ring.next_slot, only.addr, only.len, name, flags)
    rig.kick(rig.profile.main)
    rig.main_quiet(0.15)
    rig.survive(spinning=True)
    entry = ring.desc[0]
    used = bool(int(entry["flags"]) & AVAIL) == bool(int(entry["flags"]) & USED) == bool(ring.wrap)
    if used:
        told = f"buffer {name:#x} came back as {int(entry['id']):#x}"
        require(int(entry["id"]) == name, told, row="packed.used.id")
    rig.ram.expect_untouched(before, [*rig.allowed([placed])])
