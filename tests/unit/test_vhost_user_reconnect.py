# SPDX-License-Identifier: Apache-2.0
"""Twenty kills under load: a back-end is killed, another takes over, no buffer is lost.

The front-end keeps the memory, the rings and the in-flight area, as the standard has it.  What
must hold for the driver: every buffer comes back, exactly once, with the right contents.
"""

from __future__ import annotations

import os
import random
import socket
import time

import numpy as np
import pytest
from tests.fakes.backends import KillableBackend, backend_thread
from tests.fakes.driver import Element, make_driver
from tests.fakes.echo_device import EchoDevice
from tests.fakes.frontend import Closed, Frontend, R
from tests.fakes.memory import Arena, make_memory

import virtio_formats.vhost_user as vu
from vballoon.vhost_user import DEFAULT_RING_FEATURES
from vballoon.vhost_user.inflight import InflightArea
from vballoon.vhost_user.vring import Vring
from vballoon.virtio import RingRecord
from virtio_formats.virtio import features as f

KILLS = 20
RINGS, SIZE = 2, 32
PACKED = DEFAULT_RING_FEATURES | f.mask(f.VIRTIO_F_RING_PACKED)


class Load:
    """A driver that keeps its rings full and checks what comes back."""

    def __init__(self, frontend, rings, seed):
        self.frontend, self.rings = frontend, rings
        self.random = random.Random(seed)
        self.slots = {r.index: Arena(0x200000 + r.index * 0x100000, 0x100000) for r in rings}
        self.waiting = {r.index: {} for r in rings}
        self.sent = self.done = 0

    def fill(self):
        for ring in self.rings:
            arena = self.slots[ring.index]
            for _ in range(self.random.randrange(1, 8)):
                parts = self.random.choice((1, 1, 2, 3))
                if ring.driver.room < parts + 1:
                    break
                if arena.end - arena.next < 512:
                    arena.next = 0x200000 + ring.index * 0x100000
                self.offer(ring, arena, parts)
            ring.driver.publish()
            ring.kick()

    def offer(self, ring, arena, parts):
        text = b"buffer %08d" % self.sent
        pieces = [text[i::parts] for i in range(parts)]
        elements = [Element(arena.take(len(p)), len(p)) for p in pieces]
        for element, piece in zip(elements, pieces, strict=True):
            self.frontend.memory.write(element.addr, piece)
        answer = Element(arena.take(64), 64, True)
        self.frontend.memory.write(answer.addr, bytes(64))
        ident = ring.driver.add(*elements, answer)
        self.waiting[ring.index][ident] = (b"".join(pieces), answer.addr)
        self.sent += 1

    def collect(self):
        for ring in self.rings:
            ring.called()
            for ident, written in ring.driver.collect():
                # the driver's own check: a buffer that is not outstanding fails inside collect()
                text, addr = self.waiting[ring.index].pop(ident)
                assert written == len(text)
                assert self.frontend.memory.read(addr, len(text)) == text
                self.done += 1

    def run(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.fill()
            self.collect()
            time.sleep(0.0005)

    def drain(self):
        end = time.monotonic() + 20
        for ring in self.rings:
            ring.kick()
        while self.done < self.sent:
            self.collect()
            assert time.monotonic() < end, f"{self.sent - self.done} buffers were lost"
            time.sleep(0.001)


def connect(address, frontend, features, area):
    """Reconnect a front-end with the same memory, rings and in-flight area."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(address)
    sock.settimeout(20)
    frontend.sock = sock
    frontend.protocol = 0
    frontend.negotiate()
    assert frontend.features & f.mask(f.VIRTIO_F_RING_PACKED) == features & (1 << 34)
    frontend.share_memory()
    if area:
        frontend.ok(R.SET_INFLIGHT_FD, area[0].build(), [area[1]])
        return area
    wish = vu.VhostUserInflight(mmap_size=0, mmap_offset=0, num_queues=RINGS, queue_size=SIZE)
    told = vu.VhostUserInflight.parse(frontend.call(R.GET_INFLIGHT_FD, wish.build()))
    (fd,) = frontend.reply_fds
    frontend.ok(R.SET_INFLIGHT_FD, told.build(), [fd])
    return told, fd


def base_after_crash(ring, packed):
    """Return what a front-end knows of a ring whose back-end died: a split ring's used index."""
    if packed:
        return 0x7FFF7FFF  # nothing, so anything: the in-flight area has to tell
    return int(ring.driver.used[1])


@pytest.mark.parametrize("kind", ["split", "packed"])
def test_twenty_kills_under_load_lose_and_repeat_nothing(kind, tmp_path):
    features = PACKED if kind == "packed" else DEFAULT_RING_FEATURES
    address = str(tmp_path / "s")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(4)
    frontend = Frontend(socket.socket(), make_memory((0, 16 << 20)))
    frontend.sock.close()
    recovered, load, area = 0, None, None
    for kill in range(KILLS + 1):
        backend = KillableBackend(
            listener,
            ring_features=features,
            device={"hold": kill % 9 if kill < KILLS else 0, "shuffle": kill},
        )
        area = connect(address, frontend, features, area)
        if load is None:
            rings = [frontend.make_ring(i, SIZE) for i in range(RINGS)]
            load = Load(frontend, rings, seed=1)
        for ring in load.rings:
            base = base_after_crash(ring, kind == "packed") if kill else None
            frontend.start_ring(ring, base=base)
        frontend.status_ok()
        recovered += sum(load.waiting[r.index] != {} for r in load.rings)
        if kill < KILLS:
            load.run(0.03 + 0.01 * (kill % 4))
            backend.kill()
            frontend.sock.close()
        else:
            load.drain()
            backend.kill()
    assert load.done == load.sent > 20 * KILLS
    assert recovered > KILLS // 2, "the kills hardly ever met a buffer in flight"
    listener.close()
    os.close(area[1])
    frontend.close()


@pytest.mark.parametrize("meanwhile", ["nothing", "memory", "stop"])
def test_the_one_process_form_of_it_tells_what_it_recovered(tmp_path, meanwhile):
    """In-flight buffers are resubmitted in the order of their counters, and counted; also when
    the ring is taken down again before any of them was taken.
    """
    memory = make_memory((0, 16 << 20))
    path = tmp_path / "s"
    with backend_thread(EchoDevice(hold=5), path=path) as backend:
        frontend = Frontend.connect(path, memory)
        area = None
        frontend.negotiate()
        frontend.share_memory()
        wish = vu.VhostUserInflight(mmap_size=0, mmap_offset=0, num_queues=3, queue_size=16)
        told = vu.VhostUserInflight.parse(frontend.call(R.GET_INFLIGHT_FD, wish.build()))
        area = told, frontend.reply_fds[0]
        frontend.ok(R.SET_INFLIGHT_FD, told.build(), [area[1]])
        ring = frontend.new_ring(0, 16)
        frontend.status_ok()
        order = [ring.submit(b"buffer %d" % i, 32) for i in range(5)]
        ring.kick()
        deadline = time.monotonic() + 5
        while backend.status().queues[0].outstanding < 5:
            assert time.monotonic() < deadline
        copy = memoryview(bytearray(os.pread(area[1], told.mmap_size, told.mmap_offset)))
    # the back-end ended in order; simulate a crash by restoring its last used elements
    crashed = os.memfd_create("crashed")
    os.write(crashed, copy)
    frontend.sock.close()
    memory.window(ring.driver.addresses.device + 2, 2)[:] = 0  # nothing was given back
    device = EchoDevice()
    with backend_thread(device, path=path) as backend:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(path))
        sock.settimeout(5)
        frontend.sock, frontend.protocol = sock, 0
        frontend.negotiate()
        frontend.share_memory()
        frontend.ok(R.SET_INFLIGHT_FD, told.build(), [crashed])
        if meanwhile != "nothing":
            device.process = lambda queue: False  # the loop has not come to it yet
        frontend.start_ring(ring, base=0)
        frontend.status_ok()
        if meanwhile == "memory":
            frontend.ok(R.REM_MEM_REG, frontend.slot())
            del device.process
            frontend.share_memory()
        elif meanwhile == "stop":
            base = frontend.stop_ring(ring)
            del device.process
            frontend.start_ring(ring, base=base)
        ring.collect(5)
        assert backend.status().queues[0].recovered == 5
        assert device.seen == [b"buffer %d" % i for i in range(len(order))]
        assert "reset" not in device.log, "a driver that continues"
    os.close(crashed)
    os.close(area[1])
    frontend.close()


def test_a_connection_that_is_lost_in_good_order_needs_no_area(tmp_path):
    """The back-end gives back all held buffers when the front-end disconnects."""
    with backend_thread(EchoDevice(hold=3), path=tmp_path / "s") as backend:
        frontend = Frontend.connect(tmp_path / "s")
        (ring,) = frontend.up()
        for i in range(3):
            ring.submit(b"%d" % i, 8)
        ring.kick()
        deadline = time.monotonic() + 5
        while backend.status().queues[0].outstanding < 3:
            assert time.monotonic() < deadline
        frontend.sock.close()
        assert len(ring.collect(3)) == 3
        with pytest.raises((Closed, OSError)):
            frontend.send(R.GET_FEATURES)
        frontend.close()


@pytest.mark.parametrize("engine", ["batch", "scalar"])
@pytest.mark.parametrize("recorded", [False, True])
def test_the_rest_of_a_batch_that_was_never_published_is_not_seen(engine, recorded):
    """A packed batch is written from its second descriptor on, and its first one last."""

    class Killed(Exception):
        pass

    memory = make_memory((0, 1 << 20))
    driver = make_driver(memory, 8, PACKED, arena=Arena(0x1000, 0x8000))
    area = InflightArea.create(1, 8)
    at, user = driver.addresses, memory.regions[0].userspace_addr

    def start(base):
        vring = Vring(0)
        vring.num, vring.base, vring.started = 8, base, True
        vring.addr = vu.VhostVringAddr(
            index=0,
            flags=0,
            descriptor=user + at.desc,
            used=user + at.device,
            available=user + at.driver,
            log=0,
        )
        return vring, vring.build(memory, PACKED, area, RingRecord(), engine=engine)

    for turn in range(8):  # all around the ring
        first, ring = start(0x80008000 if not turn else 0)
        made = [driver.add(driver.buffer(4)) for _ in range(3)]
        driver.publish()
        taken = ring.take().ids
        assert taken.tolist() == made
        before = first._log.before_give

        def die(ids, before=before):
            if recorded:
                before(ids)
            raise Killed

        first._log.before_give = die
        with pytest.raises(Killed):
            ring.give(taken, np.zeros(3, np.uint32))
        assert driver.collect() == []
        _, ring = start(0)
        again = ring.take().ids
        assert again.tolist() == made
        for ident in made[1:] + made[:1]:
            ring.give(np.array([ident], np.uint16), np.zeros(1, np.uint32))
            assert driver.collect() == [(ident, 0)]
    area.close()
    memory.close()
