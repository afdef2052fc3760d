# SPDX-License-Identifier: Apache-2.0
""" "Ring states" and "Suspended device state" of vhost-user.rst: starting, enabling, stopping."""

from __future__ import annotations

import os
import time

import pytest
from tests.fakes.backends import backend_thread
from tests.fakes.driver import Element
from tests.fakes.echo_device import EchoDevice
from tests.fakes.frontend import F_PROTOCOL, Frontend, R
from tests.fakes.memory import make_memory

from vballoon.balloon import Balloon
from vballoon.errors import ProtocolError
from vballoon.vhost_user import DEFAULT_RING_FEATURES
from vballoon.vhost_user.vring import decode_base, encode_base
from vballoon.virtqueue import RingState
from virtio_formats.vhost_user import ProtocolFeature as P
from virtio_formats.virtio import features as f
from virtio_formats.virtio.balloon import BalloonFeature

PACKED = DEFAULT_RING_FEATURES | f.mask(f.VIRTIO_F_RING_PACKED)
KINDS = {
    "split": DEFAULT_RING_FEATURES,
    "split, no event index": f.mask(f.VIRTIO_F_VERSION_1, f.VIRTIO_F_INDIRECT_DESC),
    "packed": PACKED,
    "packed, in order": PACKED | f.mask(f.VIRTIO_F_IN_ORDER),
}


@pytest.fixture
def device():
    return EchoDevice()


@pytest.fixture
def backend(device, tmp_path):
    with backend_thread(device, path=tmp_path / "s") as backend:
        yield backend


@pytest.fixture
def frontend(backend, tmp_path):
    with Frontend.connect(tmp_path / "s") as frontend:
        yield frontend


def echo(ring, data=b"echo"):
    ident = ring.submit(data, 64)
    ring.kick()
    assert ring.collect(1) == [(ident, len(data))]


@pytest.mark.parametrize("kind", KINDS)
def test_many_buffers_through_every_kind_of_ring(kind, tmp_path):
    """Wrap-around included: a ring of 8 goes round more than a dozen times."""
    with (
        backend_thread(EchoDevice(), path=tmp_path / "s", ring_features=KINDS[kind]),
        Frontend.connect(tmp_path / "s") as frontend,
    ):
        rings = frontend.up(0, 2, size=8)
        for turn in range(60):
            for ring in rings:
                echo(ring, b"%d of %d" % (turn, ring.index))


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_started_again_where_it_stood(kind, tmp_path):
    """GET_VRING_BASE's number, given back by SET_VRING_BASE, loses and repeats nothing.

    The device is reset where the number is that of a ring which begins: that could be a reboot.
    """
    device = EchoDevice()
    beginnings = 1
    with (
        backend_thread(device, path=tmp_path / "s", ring_features=KINDS[kind]),
        Frontend.connect(tmp_path / "s") as frontend,
    ):
        (ring,) = frontend.up(0, size=8)
        for turn in range(12):
            for n in range(turn % 3):
                echo(ring, b"%d/%d" % (turn, n))
            base = frontend.stop_ring(ring)
            beginnings += base in (0, 0x80008000)
            ring.called()
            ident = ring.submit(b"while stopped %d" % turn, 64)
            ring.kick()
            assert not ring.called(0.02)
            frontend.start_ring(ring, base=base)
            assert [i for i, _ in ring.collect(1)] == [ident]
    assert device.log.count("reset") == beginnings < 6


def test_base_is_the_next_available_index_whatever_is_in_the_ring(frontend):
    (ring,) = frontend.up(0, size=4)
    for _ in range(7):
        echo(ring)
    assert frontend.stop_ring(ring) == 7


def test_base_wraps_at_16_bits(frontend):
    frontend.negotiate()
    frontend.share_memory()
    from tests.fakes.driver import SplitDriver

    ring = frontend.make_ring(0, 8)
    ring.driver = SplitDriver(frontend.memory, 8, frontend.features, frontend.arena, start=65534)
    frontend.start_ring(ring, base=65534)
    for _ in range(4):
        echo(ring)
    assert frontend.stop_ring(ring) == 2


def test_a_ring_starts_without_a_kick(frontend):
    """ "Back-ends SHOULD NOT rely on receiving a kick after VHOST_USER_SET_VRING_KICK"."""
    frontend.negotiate()
    frontend.share_memory()
    ring = frontend.make_ring()
    ident = ring.submit(b"early", 8)
    frontend.start_ring(ring)
    assert ring.collect(1) == [(ident, 5)]


def test_a_started_ring_that_is_disabled_is_left_alone_and_loses_nothing(frontend):
    frontend.negotiate()
    frontend.share_memory()
    ring = frontend.new_ring(enable=False)
    ident = ring.submit(b"wait", 8)
    ring.kick()
    assert not ring.called(0.05)
    frontend.ok(R.SET_VRING_ENABLE, frontend.state(0, 1))
    assert ring.collect(1) == [(ident, 4)]
    frontend.ok(R.SET_VRING_ENABLE, frontend.state(0, 0))
    ring.called()
    ident = ring.submit(b"once more", 16)
    ring.kick()
    assert not ring.called(0.05)
    frontend.ok(R.SET_VRING_ENABLE, frontend.state(0, 1))
    assert ring.collect(1) == [(ident, 9)]


def test_enabling_before_starting_counts(frontend):
    """ "The enabled/disabled state should still be tracked"."""
    frontend.negotiate()
    frontend.share_memory()
    frontend.ok(R.SET_VRING_ENABLE, frontend.state(0, 1))
    ring = frontend.new_ring(enable=False)
    echo(ring)


def test_without_protocol_features_rings_start_enabled(frontend):
    offered = frontend.get_u64(R.GET_FEATURES)
    frontend.negotiate(wanted=offered & ~F_PROTOCOL & DEFAULT_RING_FEATURES)
    frontend.share_memory()
    echo(frontend.new_ring())


@pytest.mark.parametrize("order", ["kick first", "address last", "memory last"])
def test_the_order_of_ring_messages_does_not_matter(frontend, order):
    frontend.negotiate()
    ring = frontend.make_ring()
    messages = {
        "num": (R.SET_VRING_NUM, frontend.state(0, 16), []),
        "addr": (R.SET_VRING_ADDR, frontend.addr_message(ring), []),
        "kick": (R.SET_VRING_KICK, frontend.u64(0), [ring.kick_fd]),
        "enable": (R.SET_VRING_ENABLE, frontend.state(0, 1), []),
        "call": (R.SET_VRING_CALL, frontend.u64(0), [ring.call_fd]),
    }
    names = {
        "kick first": ["memory", "call", "num", "enable", "addr", "kick"],
        "address last": ["memory", "num", "call", "kick", "enable", "addr"],
        "memory last": ["num", "addr", "kick", "enable", "call", "memory"],
    }[order]
    ident = ring.submit(b"x", 8)
    for name in names:
        if name == "memory":
            frontend.share_memory()
        else:
            frontend.ok(*messages[name])
    assert ring.collect(1) == [(ident, 1)]


def test_after_get_vring_base_there_is_silence(frontend, device):
    """Suspended: no write to guest memory, no notification, no message, until it starts again."""
    channel = None
    frontend.negotiate()
    frontend.share_memory()
    rings = [frontend.new_ring(i) for i in range(2)]
    frontend.status_ok()
    channel = frontend.open_channel()
    device.hold = 2
    for ring in rings:
        ring.submit(b"held", 8)
        ring.kick()
    time.sleep(0.05)
    for ring in rings:
        frontend.stop_ring(ring)
        assert len(ring.collect(1)) == 1, "what was held is given back before the ring stops"
        ring.called()
    snapshot = frontend.memory.read(0, 1 << 20)
    for ring in rings:
        ring.submit(b"not now", 8)
    snapshot = frontend.memory.read(0, 1 << 20)
    for ring in rings:
        ring.kick()
    time.sleep(0.1)
    assert frontend.memory.read(0, 1 << 20) == snapshot
    assert not any(ring.called() for ring in rings)
    channel.settimeout(0.01)
    with pytest.raises(TimeoutError):
        channel.recv(1)
    assert frontend.get_u64(R.GET_FEATURES), "messages are still answered"


def test_one_ring_stops_and_the_others_go_on(frontend, device):
    rings = frontend.up(0, 1, 2)
    frontend.stop_ring(rings[1])
    echo(rings[0])
    echo(rings[2])
    assert device.started_with[-1] == (0, 2)


def test_a_driver_that_begins_again_finds_a_reset_device(frontend, device):
    """A reboot says nothing; the rings' beginnings tell it from a pause."""
    (ring,) = frontend.up()
    echo(ring)
    frontend.stop_ring(ring)
    frontend.rings.pop(0).close()
    device.log.clear()
    echo(frontend.new_ring(0))
    assert device.log == ["reset", "start"]


def test_a_kick_descriptor_that_dies_costs_no_cpu(frontend):
    frontend.negotiate()
    frontend.share_memory()
    ring = frontend.make_ring()
    reader, writer = os.pipe()
    frontend.ok(R.SET_VRING_NUM, frontend.state(0, 16))
    frontend.ok(R.SET_VRING_ADDR, frontend.addr_message(ring))
    frontend.ok(R.SET_VRING_KICK, frontend.u64(0), [reader])
    frontend.ok(R.SET_VRING_ENABLE, frontend.state(0, 1))
    ident = ring.submit(b"by pipe", 8)
    os.write(writer, bytes(8))
    assert ring.collect(1) == [(ident, 7)]
    os.close(writer)
    os.close(reader)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_a_full_call_descriptor_does_not_block_the_device(frontend):
    frontend.negotiate()
    frontend.share_memory()
    ring = frontend.make_ring()
    os.eventfd_write(ring.call_fd, 0xFFFFFFFFFFFFFFFE)
    os.set_blocking(ring.call_fd, True)
    frontend.start_ring(ring)
    ident = ring.submit(b"x", 8)
    ring.kick()
    for _ in range(500):
        if done := ring.driver.collect():
            break
        time.sleep(0.01)
    assert done == [(ident, 1)]
    assert frontend.get_u64(R.GET_FEATURES)


def test_memory_may_change_under_running_rings(frontend, device):
    """Hot plug: the rings continue at their positions, in the new table."""
    frontend.memory = make_memory((0, 1 << 20), (1 << 30, 1 << 20))
    frontend.arena.end = 1 << 20
    frontend.negotiate(protocol=int(P.REPLY_ACK | P.CONFIGURE_MEM_SLOTS))
    frontend.ok(R.ADD_MEM_REG, frontend.slot(0), [frontend.memory.regions[0].fd])
    ring = frontend.new_ring(0, 8)
    for turn in range(10):
        echo(ring, b"turn %d" % turn)
        if turn % 2:
            frontend.ok(R.REM_MEM_REG, frontend.slot(1))
        else:
            frontend.ok(R.ADD_MEM_REG, frontend.slot(1), [frontend.memory.regions[1].fd])
    assert device.log.count("reset") == 1


def test_memory_may_change_by_whole_tables(frontend):
    frontend.negotiate(protocol=int(P.REPLY_ACK))
    frontend.share_memory()
    ring = frontend.new_ring(0, 8)
    for turn in range(5):
        echo(ring, b"turn %d" % turn)
        frontend.share_memory()


def test_a_fault_of_the_device_stops_one_queue(frontend, backend, device, caplog):
    rings = frontend.up(0, 1)
    device.fault = ZeroDivisionError("a bug in the device")
    rings[0].submit(b"x")
    rings[0].kick()
    assert os.eventfd_read(wait(rings[0].err_fd)) == 1
    device.fault = None
    assert backend.status().queues[0].broken == "internal"
    echo(rings[1])
    assert "Traceback" not in caplog.text


def test_a_device_that_cannot_even_stop_costs_one_connection(frontend, backend, device, tmp_path):
    def stop():
        raise OSError("a bug in the device")

    frontend.up()
    device.stop = stop
    frontend.send(R.GET_VRING_BASE, frontend.state(0, 0))
    frontend.expect_close()
    del device.stop
    with Frontend.connect(tmp_path / "s") as again:
        (ring,) = again.up()
        echo(ring)


def wait(fd):
    import select

    assert select.select([fd], [], [], 5)[0]
    return fd


def test_a_broken_ring_can_be_set_up_anew(frontend, backend):
    (ring,) = frontend.up()
    ring.driver.avail[1] = 999
    ring.kick()
    os.eventfd_read(wait(ring.err_fd))
    assert backend.status().queues[0].broken == "avail-idx-jump"
    frontend.stop_ring(ring)
    frontend.rings.pop(0).close()
    fresh = frontend.new_ring(0)
    assert backend.status().queues[0].state == "running"
    echo(fresh)


def test_a_flood_of_work_on_one_ring_does_not_starve_messages(frontend, device):
    """Bounded work for each wake-up: the front-end is answered while a ring is never empty."""
    (ring,) = frontend.up(0, size=64)
    frontend.sock.settimeout(5)
    for _ in range(30):
        while ring.driver.room >= 2:
            ring.submit(b"flood", 8)
        ring.kick()
        started = time.monotonic()
        assert frontend.get_u64(R.GET_FEATURES)
        assert time.monotonic() - started < 1
        ring.driver.collect()


@pytest.mark.parametrize(
    ("number", "state"),
    [
        (0x80008000, RingState(avail=0, avail_wrap=True, used=0, used_wrap=True)),
        (0x00058003, RingState(avail=3, avail_wrap=True, used=5, used_wrap=False)),
        (0x80070005, RingState(avail=5, avail_wrap=False, used=7, used_wrap=True)),
        (0xFFFF7FFF, RingState(avail=0x7FFF, avail_wrap=False, used=0x7FFF, used_wrap=True)),
    ],
)
def test_packed_bases(number, state):
    assert decode_base(number, packed=True) == state
    assert encode_base(state, packed=True) == number


def test_a_packed_base_with_its_lower_half_only_is_what_dpdk_says():
    state = decode_base(0x8003, packed=True)
    assert state == RingState(avail=3, avail_wrap=True, used=3, used_wrap=True)


def test_split_bases():
    assert decode_base(65535, packed=False).avail == 65535
    assert encode_base(RingState(avail=65535, used=3), packed=False) == 65535
    with pytest.raises(ProtocolError):
        decode_base(65536, packed=False)


def test_hints_that_wait_are_not_taken_for_reports(tmp_path):
    """A guest that continues in the middle of a hinting round, its rings enabled one by one: with
    the standard's numbers and without statistics, 3 is what Linux would use for reports."""
    features = F_PROTOCOL | f.mask(f.VIRTIO_F_VERSION_1)
    features |= int(BalloonFeature.FREE_PAGE_HINT | BalloonFeature.PAGE_REPORTING)
    with (
        backend_thread(Balloon(), path=tmp_path / "s") as backend,
        Frontend.connect(tmp_path / "s") as frontend,
    ):
        frontend.negotiate(wanted=features)
        frontend.share_memory()
        page = frontend.arena.take(4096, align=4096)
        frontend.memory.window(page, 4096)[:] = 0x5A
        hints = frontend.make_ring(3)
        hints.driver.add(Element(page, 4096, True))
        hints.driver.publish()
        for index in (0, 1):
            frontend.new_ring(index)
        frontend.start_ring(hints)
        frontend.get_u64(R.GET_FEATURES)
        assert backend.status().queues[3].taken == 0
        frontend.new_ring(4)
        frontend.status_ok()
        hints.collect(1)
        assert frontend.memory.read(page, 4096) == b"\x5a" * 4096
        assert backend.device.counters.hints_stale_pages == 1
