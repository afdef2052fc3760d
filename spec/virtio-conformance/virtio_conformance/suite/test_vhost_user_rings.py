# SPDX-License-Identifier: Apache-2.0
"""The life of a ring: stopped, started, disabled, enabled, stopped again, resumed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from virtio_conformance.findings import about, not_applicable, require
from virtio_conformance.observe import EventFd
from virtio_conformance.rig_vhost_user import VhostUserRig
from virtio_formats.vhost_user.features import ProtocolFeature as P
from virtio_formats.vhost_user.features import VhostFeature
from virtio_formats.vhost_user.requests import Request

V1 = 1 << 32
QUIET = 0.12
MakeRig = Callable[..., VhostUserRig]


def half_up(rig: VhostUserRig, *, kick: bool, enable: bool) -> None:
    """Program all rings; start and enable the main one only as requested."""
    if not rig.profile.has_requests:
        not_applicable("no device profile, so no valid request is known")
    packed = 1 << 34 if rig.packed else 0
    rig.negotiate((V1 | packed | rig.profile.features) & rig.offered)
    for index in rig.profile.queues:
        ring = rig.make_ring()
        rig.rings[index] = ring
        rig.kicks[index], rig.calls[index] = EventFd(), EventFd()
        rig.program(index, ring)
        rig.fe.vring_fd(Request.SET_VRING_CALL, index, rig.calls[index].fd)
        main = index == rig.profile.main
        if kick or not main:
            rig.fe.vring_fd(Request.SET_VRING_KICK, index, rig.kicks[index].fd)
        if enable or not main:
            rig.fe.vring(Request.SET_VRING_ENABLE, index, 1)
    rig.driver_ok()


def stop_all(rig: VhostUserRig) -> dict[int, int]:
    """Stop every ring and return their bases."""
    return {index: rig.stop_ring(index) for index in rig.rings}


@pytest.mark.requirement("vu.ring.no-kick-needed")
def test_started_without_a_kick(rig: VhostUserRig) -> None:
    """SET_VRING_KICK starts a ring that has buffers already; no kick is needed."""
    half_up(rig, kick=False, enable=True)
    if rig.profile.name == "fs":
        not_applicable("the first request of this device has to open it")
    placed = rig.submit(rig.request())
    rig.main.publish()
    index = rig.profile.main
    rig.fe.vring_fd(Request.SET_VRING_KICK, index, rig.kicks[index].fd)
    rig.check([placed], rig.collect(rig.main, 1))


@pytest.mark.requirement("vu.ring.stopped", "vu.ring.enable-kept")
def test_nothing_before_the_kick_descriptor(rig: VhostUserRig) -> None:
    """Enabled but not started, a ring rests; started, it is enabled."""
    half_up(rig, kick=False, enable=True)
    ring, index = rig.main, rig.profile.main
    if rig.profile.name == "fs":
        not_applicable("the first request of this device has to open it")
    placed = rig.submit(rig.request())
    before = rig.ram.picture()
    ring.publish()
    rig.fe.barrier()
    rig.expect_quiet(QUIET)
    rig.ram.expect_untouched(before, rig.allowed())
    with about("vu.ring.enable-kept"):
        rig.fe.vring_fd(Request.SET_VRING_KICK, index, rig.kicks[index].fd)
        rig.kick(index)
        rig.check([placed], rig.collect(ring, 1))


@pytest.mark.requirement("vu.ring.disabled", "vu.ring.enabled")
def test_disabled_ring_has_no_effects(rig: VhostUserRig) -> None:
    """Started but disabled, a ring does nothing to memory; once enabled it works."""
    half_up(rig, kick=True, enable=False)
    if rig.profile.name in ("fs", "net"):
        not_applicable("requests of this device on a disabled ring are lost by design")
    ring, index = rig.main, rig.profile.main
    placed = rig.submit(rig.request())
    before = rig.ram.picture()
    ring.publish()
    rig.kick(index)
    rig.main_quiet(QUIET)
    rig.ram.expect_untouched(before, rig.allowed())
    returned = ring.poll()
    with about("vu.ring.enabled"):
        rig.fe.vring(Request.SET_VRING_ENABLE, index, 1)
        rig.kick(index)
        if not returned:
            rig.check([placed], rig.collect(ring, 1))
        rig.run([rig.profile.exchange(rig, 1)])


@pytest.mark.requirement("vu.ring.reconfigure-live")
def test_disable_and_enable_while_running(rig: VhostUserRig) -> None:
    """ENABLE 0 and 1 while the ring runs lose nothing."""
    rig.bring_up()
    for serial in range(4):
        rig.run([rig.profile.exchange(rig, serial)])
        rig.fe.vring(Request.SET_VRING_ENABLE, rig.profile.main, 0)
        rig.fe.vring(Request.SET_VRING_ENABLE, rig.profile.main, 1)
    rig.run([rig.profile.exchange(rig, 9)])


@pytest.mark.requirement("vu.ring.no-protocol-features")
def test_without_protocol_features(new_rig: MakeRig) -> None:
    """A front-end that does not know bit 30 gets running rings without ENABLE."""
    rig = new_rig(False)
    if not rig.profile.has_requests:
        not_applicable("no device profile, so no valid request is known")
    fe = rig.fe
    fe.send(Request.SET_OWNER)
    features = (V1 | rig.profile.features) & rig.offered
    rig.features = features
    fe.set_features(features)
    fe.set_memory(rig.ram)
    for index in rig.profile.queues:
        rig.start_ring(index, rig.make_ring())
    require(not fe.features, "the suite has negotiated protocol features")
    rig.profile.prepare(rig)
    for serial in range(3):
        rig.run([rig.profile.exchange(rig, serial)])


@pytest.mark.requirement("vu.call.replace")
def test_call_descriptor_replaced(rig: VhostUserRig) -> None:
    """A new call descriptor takes over at once; the old one is silent and closed."""
    rig.bring_up()
    index = rig.profile.main
    rig.run([rig.profile.exchange(rig, 0)])
    require(rig.calls[index].wait(2.0), "no notification")
    old, new = rig.calls[index], EventFd()
    rig.fe.vring_fd(Request.SET_VRING_CALL, index, new.fd)
    rig.fe.barrier()
    old.take()
    rig.calls[index] = new
    new.take()
    rig.run([rig.profile.exchange(rig, 1)])
    require(new.wait(2.0), "no notification on the new descriptor")
    require(not old.take(), "a notification on the old descriptor")
    old.close()


@pytest.mark.requirement("vu.base.resume")
def test_kick_descriptor_of_the_last_start(rig: VhostUserRig) -> None:
    """A ring started again listens to its new kick descriptor; the old one means nothing."""
    rig.bring_up()
    index = rig.profile.main
    for serial in range(4):
        rig.run([rig.profile.exchange(rig, serial)])
        rig.stop_ring(index)
        old, rig.kicks[index] = rig.kicks[index], EventFd()
        rig.start_ring(index, rig.main)
        old.signal()
        rig.fe.barrier()
        old.close()
    rig.run([rig.profile.exchange(rig, 4)])
    if not rig.target.options.polls:
        told = "the back-end uses a whole processor"
        require(rig.process.settles(), told, row="vu.robust.idle-cpu")


@pytest.mark.requirement("vu.call.replace")
def test_no_call_descriptor(rig: VhostUserRig) -> None:
    """Without a call descriptor requests are served silently."""
    rig.bring_up()
    index = rig.profile.main
    rig.fe.vring_fd(Request.SET_VRING_CALL, index, None)
    rig.fe.barrier()
    rig.calls[index].take()
    for serial in range(3):
        rig.run([rig.profile.exchange(rig, serial)])
    require(not rig.calls[index].take(), "a notification on a descriptor that was taken back")


@pytest.mark.requirement("vu.robust.nofd-kick")
@pytest.mark.parametrize(
    "request_type", [Request.SET_VRING_KICK, Request.SET_VRING_ERR], ids=lambda r: r.name
)
def test_no_descriptor(new_rig: MakeRig, request_type: Request) -> None:
    """The invalid-descriptor flag for kick and error does no harm."""
    rig = new_rig(False)
    rig.bring_up()
    try:
        rig.fe.vring_fd(request_type, rig.profile.main, None)
        rig.main_quiet(0.05)
    except AssertionError:
        pass
    rig.survive(spinning=request_type == Request.SET_VRING_ERR)


@pytest.mark.requirement("vu.base.resume", "vu.base.get", "vu.base.set")
@pytest.mark.parametrize("size", [4, 5, 16])
def test_stop_and_resume(rig: VhostUserRig, size: int) -> None:
    """A ring that is started again at its base neither loses nor repeats buffers."""
    if not rig.packed and size == 5:
        not_applicable("split rings have sizes that are powers of two")
    ring = rig.bring_up(size=size)
    index = rig.profile.main
    if len(rig.request().segments) > size:
        not_applicable(f"a request needs more than {size} descriptors")
    for turn in range(3 * size):
        rig.run([rig.profile.exchange(rig, turn)], watch=False)
        with about("vu.base.get"):
            base = rig.stop_ring(index)
            rig.check_base(index, base)
        rig.start_ring(index, ring, base=rig.start_base(ring))


@pytest.mark.requirement("vu.base.resume", "vu.base.complete")
def test_stop_in_the_middle(rig: VhostUserRig) -> None:
    """Stopped amid a batch: what was taken is complete, what was not comes after the resumption."""
    ring = rig.bring_up(size=64)
    index = rig.profile.main
    per = len(rig.request().segments)
    for turn in range(6):
        placed = [rig.submit(rig.request(i, align=8)) for i in range(64 // per)]
        ring.publish()
        rig.kick(index)
        base = rig.stop_ring(index)
        used = ring.poll()
        before = rig.ram.picture()
        rig.main_quiet(0.03)
        told = "buffers come back after GET_VRING_BASE"
        require(not ring.poll(), told, row="vu.base.complete")
        rig.ram.expect_untouched(before, row="vu.base.complete")
        if not rig.packed:
            told = f"base {base:#x}, used are {rig.main_split.last_used:#x}, turn {turn}"
            require(base & 0xFFFF == rig.main_split.last_used, told, row="vu.base.complete")
            rig.start_ring(index, ring, base=base & 0xFFFF)
        else:
            half = rig.main_packed.used_slot | rig.main_packed.used_wrap << 15
            told = f"base {base:#x}, the used index is {half:#x}"
            require(base & 0xFFFF == half, told, row="vu.base.complete")
            rig.start_ring(index, ring, base=half | half << 16)
        rig.kick(index)
        used += rig.collect(ring, len(placed) - len(used))
        rig.check(placed, used)


@pytest.mark.requirement("vu.suspended", "vu.ring.stopped")
def test_silence_when_stopped(rig: VhostUserRig) -> None:
    """With all rings stopped: no writes, no notifications, no messages; requests are answered."""
    rig.bring_up()
    rig.warm_up()
    stop_all(rig)
    for event in rig.calls.values():
        event.take()
    placed = rig.submit(rig.request(1))
    before = rig.ram.picture()
    rig.main.publish()
    for index in rig.rings:
        rig.kick(index)
    rig.main_quiet(QUIET)
    for region in rig.ram.regions:
        require(region.fd > 0, "the suite lost its memory")
    rig.ram.expect_untouched(before, rig.main.publish_span)
    require(not rig.main.poll(), "a stopped ring was processed", row="vu.ring.stopped")
    require(not any(e.take() for e in rig.calls.values()), "a notification from a stopped device")
    require(rig.fe.tap.silent(0.02), "a message from a stopped device")
    rig.fe.barrier()
    require(placed.id >= 0, "the suite did not submit")
    if not rig.target.options.polls:
        told = "a stopped device uses a whole processor"
        require(rig.process.settles(), told, row="vu.robust.idle-cpu")


@pytest.mark.requirement("vu.base.set")
def test_driver_starts_anew(rig: VhostUserRig) -> None:
    """After a stop, rings with other addresses and sizes begin at 0, as after a guest's reboot."""
    rig.bring_up(size=16)
    for turn, size in enumerate((32, 8, 64)):
        for serial in range(5):
            rig.run([rig.profile.exchange(rig, serial)])
        stop_all(rig)
        for index in list(rig.rings):
            rig.start_ring(index, rig.make_ring(size))
        rig.driver_ok()
        require(turn < 3, "unreachable")
    rig.run([rig.profile.exchange(rig, 0)])


@pytest.mark.requirement("vu.features.live")
def test_logging_toggled_while_running(rig: VhostUserRig) -> None:
    """SET_FEATURES that only adds or removes LOG_ALL leaves rings running."""
    if not rig.fe.get_u64(Request.GET_FEATURES) & VhostFeature.LOG_ALL:
        not_applicable("LOG_ALL is not offered")
    rig.bring_up()
    for serial in range(4):
        log = VhostFeature.LOG_ALL if serial % 2 == 0 else 0
        rig.reset_features(rig.features | log)
        rig.run([rig.profile.exchange(rig, serial)])


@pytest.mark.requirement("vu.reset-device")
def test_reset_device(rig: VhostUserRig) -> None:
    """RESET_DEVICE disables rings and keeps the connection; the device can be started anew."""
    rig.need_protocol(P.RESET_DEVICE)
    rig.bring_up()
    rig.warm_up()
    rig.fe.do(Request.RESET_DEVICE)
    placed = rig.submit(rig.request(1))
    before = rig.ram.picture()
    rig.main.publish()
    rig.kick(rig.profile.main)
    rig.main_quiet(QUIET)
    rig.ram.expect_untouched(before, rig.main.publish_span)
    require(placed.id >= 0, "the suite did not submit")
    stop_all(rig)
    rig.fe.set_features(rig.fe.acked)
    for index in list(rig.rings):
        rig.start_ring(index, rig.make_ring())
    rig.driver_ok()
    rig.profile.prepare(rig)
    rig.run([rig.profile.exchange(rig, 2)])


@pytest.mark.requirement("vu.ring.enabled")
def test_every_queue_of_the_profile_works(rig: VhostUserRig) -> None:
    """Two rings that take the same requests do so independently."""
    if rig.profile.other is None:
        not_applicable("only one ring of this device takes requests that are known")
    rig.bring_up()
    for serial in range(3):
        rig.run([rig.profile.exchange(rig, serial)])
        rig.run([rig.profile.exchange(rig, serial)], queue=rig.profile.other)
    rig.stop_ring(rig.profile.main)
    rig.run([rig.profile.exchange(rig, 7)], queue=rig.profile.other)
