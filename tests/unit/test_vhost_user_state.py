# SPDX-License-Identifier: Apache-2.0
"""The state of a vhost-user back-end: another process continues a live connection from it."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.descriptors import open_fds
from tests.fakes.driver import make_driver
from tests.fakes.echo_device import EchoDevice
from tests.fakes.memory import Arena
from tests.fakes.vhost_io import FakeIo

import virtio_formats.vhost_user as vu
from vballoon.errors import PeerError, ProtocolError
from vballoon.memory import GuestMemory, MemoryRegion
from vballoon.vhost_user import PROTOCOL_FEATURES, VhostUserBackend
from vballoon.vhost_user.packing import pack, unpack
from vballoon.vhost_user.state import AreaState, BackendState, RegionState, VringState
from vballoon.virtio import RingFault, RingRecord
from vballoon.virtqueue import RingState
from virtio_formats.virtio import features as f

MIB = 1 << 20
USER = 1 << 40
PACKED = 1 << f.VIRTIO_F_RING_PACKED
RING_FEATURES = f.mask(f.VIRTIO_F_VERSION_1) | PACKED
PROTOCOL = 1 << 30
SIZE = 8


def u64(value):
    return vu.VhostUserU64(u64=value).build()


def dup(fds):
    return {slot: os.dup(fd) for slot, fd in fds.items()}


class Front:
    """A front-end and its guest; they outlive the back-ends that serve them one after another."""

    def __init__(self, *, packed=False, hold=0, own_record=True):
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, MIB)
        region = MemoryRegion.map(
            guest_phys_addr=0, size=MIB, file_offset=0, fd=os.dup(self.fd), userspace_addr=USER
        )
        self.memory = GuestMemory([region])
        self.features = f.mask(f.VIRTIO_F_VERSION_1) | (PACKED if packed else 0)
        self.arena = Arena(0x1000, MIB // 2)
        self.hold, self.own_record = hold, own_record
        self.rings = [
            make_driver(self.memory, SIZE, self.features, arena=self.arena) for _ in range(2)
        ]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.front_channel, self.channel = socket.socketpair()
        self.start()

    def start(self):
        self.io = FakeIo()
        self.device = EchoDevice(hold=self.hold)
        self.backend = VhostUserBackend(
            self.device, self.io, ring_features=RING_FEATURES, own_record=self.own_record
        )

    def send(self, request, payload=b"", fds=()):
        head = vu.VhostUserHeader(request=request, flags=1, size=len(payload)).build()
        self.backend.session.feed(head + payload, [os.dup(fd) for fd in fds])
        self.io.run()
        assert self.backend.session.is_open, self.backend.session.error
        output = self.backend.session.take_output()
        for _, sent in output:
            for fd in sent:
                os.close(fd)
        return output

    def set_up(self):
        self.send(vu.Request.SET_OWNER)
        self.send(vu.Request.SET_FEATURES, u64(self.features | PROTOCOL))
        self.send(vu.Request.SET_PROTOCOL_FEATURES, u64(int(PROTOCOL_FEATURES)))
        self.send(vu.Request.SET_BACKEND_REQ_FD, b"", [self.channel.fileno()])
        region = vu.VhostUserMemoryRegion(
            guest_address=0, size=MIB, user_address=USER, mmap_offset=0
        )
        self.send(vu.Request.ADD_MEM_REG, bytes(8) + region.build(), [self.fd])
        self.send(vu.Request.SET_STATUS, u64(15))
        for index in range(2):
            self.ring(index)

    def ring(self, index):
        at = self.rings[index].addresses
        addr = vu.VhostVringAddr(
            index=index,
            flags=0,
            descriptor=USER + at.desc,
            used=USER + at.device,
            available=USER + at.driver,
            log=0,
        )
        state = vu.VhostVringState(index=index, num=SIZE)
        self.send(vu.Request.SET_VRING_NUM, state.build())
        base = 0x80008000 if self.features & PACKED else 0
        self.send(vu.Request.SET_VRING_BASE, vu.VhostVringState(index=index, num=base).build())
        self.send(vu.Request.SET_VRING_ADDR, addr.build())
        self.send(vu.Request.SET_VRING_CALL, u64(index), [self.calls[index]])
        self.send(vu.Request.SET_VRING_KICK, u64(index), [self.kicks[index]])
        self.send(vu.Request.SET_VRING_ENABLE, vu.VhostVringState(index=index, num=1).build())

    def submit(self, index, text, *, kick=True):
        ring = self.rings[index]
        out, back = ring.buffer(len(text)), ring.buffer(len(text), writable=True)
        self.memory.write(out.addr, text)
        ring.add(out, back)
        ring.publish()
        if kick:
            self.io.watched[self.backend.vrings[index].kick]()
            self.io.run()
        return back.addr

    def die(self):
        """End the process without any clean-up: only its state and descriptors remain."""
        state, fds = self.backend.state()
        data, kept = pack(state), dup(fds)
        backend, io = self.backend, self.io
        backend.device.stop = lambda: None  # nothing is given back by a dead process
        backend.rings.set._bound.clear()  # ... and no record is ended
        io.later.clear()
        backend.close()
        return data, kept

    def restart(self):
        data, kept = self.die()
        self.start()
        self.backend.restore(unpack(data), kept)
        self.io.run()

    def close(self):
        self.backend.close()
        del self.backend, self.device, self.io
        self.rings.clear()
        gc.collect()
        self.memory.close()
        for fd in [self.fd, *self.calls, *self.kicks]:
            os.close(fd)
        self.front_channel.close()
        self.channel.close()


@contextlib.contextmanager
def front(**options):
    before = open_fds()
    made = Front(**options)
    try:
        made.set_up()
        yield made
    finally:
        made.close()
    assert open_fds() == before, "descriptors leaked"


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_restarted_process_continues_the_connection(packed):
    with front(packed=packed) as guest:
        before = guest.submit(0, b"before")
        assert len(guest.rings[0].collect()) == 1
        for turn in range(5):  # around the ring
            unseen = guest.submit(0, b"unseen", kick=False)
            guest.restart()
            assert guest.memory.read(unseen, 6) == b"unseen", "served without a kick"
            assert len(guest.rings[0].collect()) == 1
            after = guest.submit(0, b"after")
            assert guest.memory.read(after, 5) == b"after"
            assert len(guest.rings[0].collect()) == 1
            assert guest.backend.rings.set.record(0).taken == 3 + 2 * turn
        assert guest.memory.read(before, 6) == b"before"
        assert "reset" not in guest.device.log


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_buffers_in_flight_are_served_by_the_next_process(packed):
    with front(packed=packed, hold=2) as guest:
        answers = [guest.submit(1, text) for text in (b"one", b"two", b"six")]
        assert len(guest.rings[1].collect()) == 1
        guest.restart()
        assert guest.device.seen == [b"two", b"six"], "what was held, and no other"
        assert guest.backend.vrings[1].recovered == 2
        guest.submit(1, b"ten")
        guest.submit(1, b"nil")
        assert len(guest.rings[1].collect()) == 2
        assert [guest.memory.read(at, 3) for at in answers] == [b"one", b"two", b"six"]


def test_a_split_ring_without_a_record_is_served_from_its_used_index():
    with front(own_record=False, hold=2) as guest:
        for text in (b"one", b"two", b"six"):
            guest.submit(1, text)
        guest.restart()
        assert guest.device.seen == [b"two", b"six"]


def test_a_packed_ring_without_a_record_is_broken():
    with front(own_record=False, packed=True) as guest:
        guest.submit(1, b"one")
        guest.restart()
        assert guest.backend.rings.set.record(1).broken.rule == "ring-position"


def test_the_state_restored_is_the_state():
    with front() as guest:
        guest.submit(0, b"x")
        guest.restart()
        state, fds = guest.backend.state()
        data, kept = guest.die()
        assert unpack(data) == state
        guest.start()
        guest.backend.restore(state, kept)
        assert guest.backend.state()[0] == state
        assert set(guest.backend.state()[1]) == set(fds), "slots stay"


def test_a_new_descriptor_gets_a_new_slot():
    with front() as guest:
        first, _ = guest.backend.state()
        guest.send(vu.Request.SET_VRING_CALL, u64(0), [guest.calls[0]])
        second, fds = guest.backend.state()
        assert second.vrings[0].call not in (0, first.vrings[0].call)
        assert replace(second.vrings[0], call=first.vrings[0].call) == first.vrings[0]
        assert first.vrings[0].call not in fds


def test_nothing_stays_mapped_once_it_is_unused():
    """Neither a state nor the cycle of back-end and connection may keep a mapping alive."""

    def mapped():
        with open("/proc/self/maps", encoding="ascii") as maps:
            return [line for line in maps if "vhost-inflight" in line or "memfd:extra" in line]

    before = mapped()
    gc.disable()
    try:
        with front() as guest:
            region = vu.VhostUserMemoryRegion(
                guest_address=1 << 32, size=MIB, user_address=USER << 1, mmap_offset=0
            )
            extra = os.memfd_create("extra", os.MFD_CLOEXEC)
            os.ftruncate(extra, MIB)
            guest.send(vu.Request.ADD_MEM_REG, bytes(8) + region.build(), [extra])
            guest.backend.state()
            assert len(mapped()) == len(before) + 2
            guest.send(vu.Request.REM_MEM_REG, bytes(8) + region.build())
            guest.backend.state()
            assert len(mapped()) == len(before) + 1
            guest.submit(0, b"used")
            guest.backend.state()
            guest.backend.close()
            assert mapped() == before
            os.close(extra)
    finally:
        gc.enable()


def test_a_parked_ring_keeps_its_position():
    with front(own_record=False) as guest:
        guest.submit(0, b"x")
        guest.backend.rings.set.park()
        state, _ = guest.backend.state()
        assert state.vrings[0].record.position == RingState(avail=1, used=1)
        guest.restart()
        answer = guest.submit(0, b"y")
        assert guest.memory.read(answer, 1) == b"y"
        assert guest.device.seen == [b"y"]


def test_a_broken_ring_stays_broken():
    with front() as guest:
        guest.device.fault = ZeroDivisionError("a bug")
        guest.submit(0, b"x")
        guest.device.fault = None
        broken = guest.backend.rings.set.record(0).broken
        guest.restart()
        assert guest.backend.rings.set.record(0).broken == broken
        assert 0 not in guest.backend.queues
        assert guest.memory.read(guest.submit(1, b"y"), 1) == b"y"


# -- the bytes -----------------------------------------------------------------------------------

numbers = st.integers(0, 2**16 - 1)
longs = st.integers(0, 2**64 - 1)
ints = st.integers(0, 2**32 - 1)
texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=32)
records = st.builds(
    RingRecord,
    position=st.none() | st.builds(RingState, numbers, numbers, st.booleans(), st.booleans()),
    outstanding=ints,
    broken=st.none() | st.builds(RingFault, texts, texts),
    taken=longs,
    given=longs,
    notified=longs,
    kicked=longs,
)
areas = st.builds(AreaState, st.integers(1, 99), longs, longs, ints, ints)
logs = st.builds(AreaState, st.integers(1, 99), longs, longs)
vrings = st.builds(
    VringState, ints, st.none() | st.tuples(ints, longs, longs, longs, longs), st.none() | ints,
    st.booleans(), st.booleans(), ints, ints, ints, ints, st.booleans(), records,
)  # fmt: skip
states = st.builds(
    BackendState, longs, longs, ints, *[st.booleans()] * 6, longs,
    st.lists(st.builds(RegionState, longs, longs, longs, longs, ints), max_size=3).map(tuple),
    st.none() | areas, st.none() | logs, ints, ints,
    st.lists(vrings, max_size=3).map(tuple),
    st.lists(st.tuples(ints, longs), max_size=3).map(tuple),
)  # fmt: skip


@given(states)
@settings(max_examples=60)
def test_what_is_packed_is_unpacked(state):
    assert unpack(pack(state)) == state


SAMPLE = BackendState(
    acked=0x1_4000_0003,
    protocol_features=0x1234,
    status=15,
    owned=True,
    standstill=False,
    config_changes=2,
    regions=(RegionState(0, MIB, USER, 0, 1),),
    inflight=AreaState(2, 4096, 0, 1, 8),
    channel=3,
    vrings=(
        VringState(
            num=8,
            addr=(0, USER, USER + 4096, USER + 8192, 0),
            base=5,
            started=True,
            enabled=True,
            kick=4,
            call=5,
            ran=True,
            record=RingRecord(broken=RingFault("head-range", "9 of 8"), taken=7, given=6),
        ),
    ),
    counters=((1, 1), (12, 3)),
)


def test_the_packed_form_of_this_version():
    """A later version reads these bytes, or refuses them: it never misreads them."""
    assert pack(SAMPLE).hex() == VECTOR
    assert unpack(bytes.fromhex(VECTOR)) == SAMPLE


def test_every_corrupted_byte_is_refused():
    data = bytes.fromhex(VECTOR)
    for at in range(len(data)):
        for bad in (data[at] ^ 1, data[at] ^ 0x80, data[at] ^ 0xFF):
            with pytest.raises(ProtocolError, match="state-format"):
                unpack(data[:at] + bytes([bad]) + data[at + 1 :])


@pytest.mark.parametrize("size", [0, 3, 127, -1])
def test_a_state_cut_short_is_refused(size):
    data = bytes.fromhex(VECTOR)
    for cut in (data[:size], data + b"\0"):
        with pytest.raises(ProtocolError, match="state-format"):
            unpack(cut)


def corrupted(state):
    """Every field of *state*, in turn, with values that it does not have."""
    for field in fields(state):
        value = getattr(state, field.name)
        for other in _others(value):
            if other != value:
                yield f"{field.name}={other!r:.40}", replace(state, **{field.name: other})


def _others(value):
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [0, 1, 3, 255, 1 << 20, 2**32 - 1, 2**63]
    if isinstance(value, tuple) and value and isinstance(value[0], int):
        return [
            (*value[:at], other, *value[at + 1 :]) for at in range(5) for other in (1, 2**64 - 1)
        ]
    if isinstance(value, tuple):
        return [(), value[:1], value * 2]
    return []


def damaged(state):
    """*state* with a single field changed, at any depth."""
    yield from corrupted(state)
    for part in ("inflight", "log"):
        if getattr(state, part) is not None:
            for name, other in corrupted(getattr(state, part)):
                yield f"{part}.{name}", replace(state, **{part: other})
    for part in ("regions", "vrings"):
        for name, other in corrupted(getattr(state, part)[0]):
            yield f"{part}[0].{name}", replace(state, **{part: (other, *getattr(state, part)[1:])})


def test_every_damaged_field_is_refused_or_restored_and_nothing_leaks():
    """No checksum here: a refused state changes nothing, an accepted one is what was given.

    Whatever is restored, the device lives on, and the connection closes in good order.
    """
    with front() as guest:
        guest.submit(0, b"x")
        data, kept = guest.die()
        state = unpack(data)
        refused = []
        for name, bad in damaged(state):
            guest.start()
            gc.collect()
            before = open_fds()
            try:
                guest.backend.restore(bad, dup(kept))
            except PeerError:
                refused.append(name)
            else:
                guest.io.run()
                guest.backend.close()
                continue
            # Here, and not above: a traceback keeps mappings until it is gone.
            gc.collect()
            assert open_fds() == before, name
            assert not guest.backend.memory.regions
            assert guest.backend.state()[0] == BackendState(vrings=(VringState(),) * 3)
            guest.backend.close()
        assert len(refused) > 60
        for name in ("acked=1", "vrings=()", "regions[0].size=0", "vrings[0].num=3"):
            assert any(name in other for other in refused), name
        guest.start()
        for fd in kept.values():
            os.close(fd)


VECTOR = (
    "564256550100000034ab9d2c030000000100000001000000020000000f000000030000400100000034120000"
    "0000000002000000000000000010000000000000000000000000000001000000080000000200000000000000"
    "0000000000000000000000000000000000000000030000000000000000000000000010000000000000000000"
    "00010000000000000000000001000000000000001f0000000800000005000000000000000000000000010000"
    "001000000001000000200000000100000000000000000000040000000500000000000000000000000e000000"
    "0000000000000000000000000700000000000000060000000000000000000000000000000000000000000000"
    "686561642d72616e67650000000000000000000000000000000000000000000039206f662038000000000000"
    "0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "0000000000000000000000000000000000000000000000000000000001000000000000000100000000000000"
    "0c000000000000000300000000000000"
)
