# SPDX-License-Identifier: Apache-2.0
"""A second setting replaces the first: status, connections, regions, log, in-flight data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from virtio_conformance.dirty_log import Log
from virtio_conformance.findings import Closed, about, not_applicable, preparing, require
from virtio_conformance.memory import PAGE
from virtio_conformance.rig_vhost_user import VhostUserRig
from virtio_conformance.vhost_user import region_payload
from virtio_formats.vhost_user.features import ProtocolFeature as P
from virtio_formats.vhost_user.features import VhostFeature, VringFlag
from virtio_formats.vhost_user.payloads import VhostUserMemRegMsg, VhostUserU64, VhostVringState
from virtio_formats.vhost_user.requests import Request
from virtio_formats.virtio.features import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC
from virtio_formats.virtio.status import DeviceStatus as S

MakeRig = Callable[..., VhostUserRig]


@pytest.fixture
def log() -> Iterator[Log]:
    """Return a dirty log."""
    made = Log()
    yield made
    made.close()


# -- device status -----------------------------------------------------------------------------


def status(rig: VhostUserRig, value: int) -> int:
    """Set the device status and return what it reads."""
    rig.fe.do(Request.SET_STATUS, VhostUserU64(u64=value).build())
    return rig.fe.get_u64(Request.GET_STATUS) & 0xFF


@pytest.mark.requirement("vu.status", "basic.reset.status-zero")
def test_status_of_a_running_device(split_rig: VhostUserRig) -> None:
    """FEATURES_OK and DRIVER_OK read back; 0 is a reset, after which the status reads 0."""
    rig = split_rig
    rig.need_protocol(P.STATUS)
    rig.bring_up()
    ready = S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK | S.DRIVER_OK
    got = rig.fe.get_u64(Request.GET_STATUS) & 0xFF
    require(got == ready, f"status {got:#x} where {ready:#x} was written")
    got = status(rig, 0)
    require(got == 0, f"status {got:#x} after 0 was written", row="basic.reset.status-zero")


@pytest.mark.requirement("basic.reset.silent")
def test_silence_after_status_zero(split_rig: VhostUserRig) -> None:
    """After the driver wrote 0 to the status no queue is touched and nobody is notified."""
    rig = split_rig
    rig.need_protocol(P.STATUS)
    rig.bring_up()
    rig.warm_up()
    status(rig, 0)
    rig.calls[rig.profile.main].take()
    rig.submit(rig.request(1))
    before = rig.ram.picture()
    rig.main.publish()
    rig.kick(rig.profile.main)
    rig.main_quiet(0.1)
    rig.ram.expect_untouched(before, rig.main.publish_span)
    require(not rig.calls[rig.profile.main].take(), "a notification after a reset")


# -- connections -------------------------------------------------------------------------------


@pytest.mark.requirement("vu.reconnect")
def test_second_connection_that_negotiates_less(new_rig: MakeRig) -> None:
    """Nothing of what the first front-end negotiated is left for one that negotiates less."""
    first = new_rig(False)
    bits = [bit for bit in (VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC) if first.offered >> bit & 1]
    first.bring_up(*bits)
    first.warm_up()
    first.leave()
    if first.target.ends_after_a_connection():
        not_applicable("the back-end serves one connection and ends")
    with about("vu.reconnect"):
        rig = new_rig(False)
        rig.bring_up()
        ring = rig.main_split
        for serial in range(4):
            ring.set_used_event(ring.last_used + 1000)  # means nothing without EVENT_IDX
            rig.calls[rig.profile.main].take()
            rig.run([rig.profile.exchange(rig, serial)], watch=False)
            told = "no notification: used_event counts although EVENT_IDX was not negotiated"
            require(rig.calls[rig.profile.main].wait(2.0), told)


# -- regions -----------------------------------------------------------------------------------


@pytest.mark.requirement("vu.mem.identity")
@pytest.mark.parametrize("wrong", ["guest_address", "user_address", "size"])
def test_region_is_identified_by_all_of_its_keys(new_rig: MakeRig, wrong: str) -> None:
    """REM_MEM_REG with one key of another region removes nothing."""
    rig = new_rig(False, slots=True)
    rig.need_protocol(P.CONFIGURE_MEM_SLOTS)
    rig.bring_up()
    rig.warm_up()
    body = region_payload(rig.ram.regions[2])
    keys = {name: getattr(body, name) for name in ("guest_address", "user_address", "size")}
    keys[wrong] += PAGE
    message = VhostUserMemRegMsg(padding=0, mmap_offset=0, **keys).build()
    try:
        verdict = rig.fe.attempt(Request.REM_MEM_REG, message)
    except Closed:
        return
    acknowledged = bool(rig.fe.protocol & P.REPLY_ACK)
    require(verdict or not acknowledged, f"a removal with another {wrong} is acknowledged")
    rig.run([rig.request(1, region=2)])


# -- dirty log ---------------------------------------------------------------------------------


def logging(rig: VhostUserRig, log: Log) -> None:
    """Bring a device up that logs everything, its used ring too."""
    rig.need_log()
    rig.bring_up(size=SIZE)
    log.attach(rig)
    rig.reset_features(rig.features | VhostFeature.LOG_ALL)
    log_used_ring(rig, rig.main.device_span[0][0])


def log_used_ring(rig: VhostUserRig, where: int) -> None:
    """Tell the main ring's addresses again, with the log flag."""
    rig.fe.vring_addr(rig.profile.main, rig.main.areas, rig.ram, flags=VringFlag.LOG, log=where)


SIZE = 64


@pytest.mark.requirement("vu.log.used-ring")
def test_second_log_replaces_the_first(split_rig: VhostUserRig, log: Log) -> None:
    """After another SET_LOG_BASE the new log is marked, and the old one is not any more."""
    rig = split_rig
    logging(rig, log)
    rig.run([rig.request(0)])
    second = Log()
    try:
        second.attach(rig)
        log.clear()
        rig.run([rig.request(1)])
        rig.fe.barrier()
        require(second.pages(), "nothing is marked in the second log")
        require(not log.pages(), "the first log is still marked")
    finally:
        second.close()


@pytest.mark.requirement("vu.log.used-ring")
def test_region_added_while_logging(new_rig: MakeRig, log: Log) -> None:
    """ADD_MEM_REG and REM_MEM_REG during logging lose no mark."""
    rig = new_rig(False, slots=True)
    rig.need_protocol(P.CONFIGURE_MEM_SLOTS)
    logging(rig, log)
    region = rig.ram.regions[3]
    ring_page = rig.main.device_span[0][0] // PAGE
    for serial, change in enumerate((rig.fe.remove_region, rig.fe.add_region)):
        require(change(region) == 0, "a good change of the regions is refused", row="vu.mem.add")
        log.clear()
        rig.run([rig.request(serial)])
        rig.fe.barrier()
        told = f"the used ring is not logged after {change.__name__}"
        require(ring_page in log.pages(), told)


def largest(rig: VhostUserRig) -> int:
    """Return the largest of a few ring sizes that the back-end accepts."""
    for size in (4096, 1024, 512, 256):
        message = VhostVringState(index=0, num=size).build()
        if not rig.fe.attempt(Request.SET_VRING_NUM, message):
            return size
    return SIZE


@pytest.mark.requirement("vu.log.used-ring", "vu.log.guest-addr")
@pytest.mark.parametrize("part", [0, 1, 3, 7, 8], ids=str)
def test_used_ring_of_many_pages(split_rig: VhostUserRig, log: Log, part: int) -> None:
    """The page of the element is marked, wherever in the ring it lies, over bytes of the log."""
    rig = split_rig
    rig.need_log()
    if not rig.profile.has_requests:
        not_applicable("no device profile, so no valid request is known")
    with preparing():
        rig.negotiate((1 << 32 | rig.profile.features) & rig.offered)
        size = largest(rig)
        at = max(size * part // 8 - 1, 0)  # an element at each eighth of the ring, and the first
        for index in rig.profile.queues:
            main = index == rig.profile.main
            ring = rig.make_ring(size if main else 16, start=at if main else 0)
            rig.start_ring(index, ring, base=at if main else 0)
        rig.driver_ok()
        rig.profile.prepare(rig)
        log.attach(rig)
        rig.reset_features(rig.features | VhostFeature.LOG_ALL)
    where = 0x1_4020_0000 + 7 * PAGE  # the next page is in another byte of the log
    log_used_ring(rig, where)
    log.clear()
    first = rig.main_split.last_used
    rig.run([rig.request(0)], watch=False)
    rig.fe.barrier()
    for word, place in (("element", where + 4 + 8 * (first % size)), ("index", where + 2)):
        told = f"the page of the used {word} at {place:#x} is not marked"
        require(place // PAGE in log.pages(), told)


@pytest.mark.requirement("vu.robust.leak")
def test_logs_do_not_pile_up(split_rig: VhostUserRig, log: Log) -> None:
    """Setting the log repeatedly keeps only the newest one open."""
    rig = split_rig
    rig.need_log()
    rig.bring_up()
    log.attach(rig)
    held = len(rig.process.fds()) + rig.process.mappings("conformance-log")
    for _ in range(8):
        log.attach(rig)
    rig.fe.barrier()
    now = len(rig.process.fds()) + rig.process.mappings("conformance-log")
    require(now <= held, f"{now - held} descriptors and mappings more")
    require(os.fstat(log.fd).st_size > 0, "the suite lost its log")
