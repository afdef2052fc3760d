# SPDX-License-Identifier: Apache-2.0
"""Random conversations.  Property: a documented reply, or a closed connection, and nothing else.

A machine plays a front-end that is sometimes right, often wrong: any message, with good and bad
numbers, with too few and too many descriptors, in any order, and with rings whose contents are
random too.  After every message:

* nothing was raised;
* exactly one reply came if one is due by the standard's rules, else none (or the end);
* descriptors are accounted for, and at the end all of them are closed.
"""

from __future__ import annotations

import gc
import logging
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.fakes.echo_device import EchoDevice
from tests.fakes.memory import memfd
from tests.fakes.vhost_io import FakeIo

import virtio_formats.vhost_user as vu
from vballoon.vhost_user import DEFAULT_RING_FEATURES, PROTOCOL_FEATURES, VhostUserBackend
from virtio_formats.vhost_user import ProtocolFeature as P
from virtio_formats.vhost_user import Request

MIB = 1 << 20
USER = 1 << 40
EVERY_RING = DEFAULT_RING_FEATURES | 1 << 34 | 1 << 35
FEATURES = EVERY_RING | 3 | 1 << 26 | 1 << 30

numbers = st.one_of(
    st.integers(0, 4),
    st.sampled_from([8, 16, 255, 256, 0x100, 0x101, 0xFFFF, 1 << 16, 1 << 31, (1 << 32) - 1]),
)
words = st.one_of(
    st.integers(0, 16).map(lambda n: n * 4096),
    st.sampled_from([1, 4095, MIB - 1, MIB, USER, USER + 4096, 1 << 63, (1 << 64) - 4096]),
    st.integers(0, (1 << 64) - 1),
)
ring_words = st.integers(0, 255).map(lambda page: USER + page * 4096)


def u64(value):
    return vu.VhostUserU64(u64=value).build()


def state(index, num):
    return vu.VhostVringState(index=index, num=num).build()


PAYLOADS = {
    vu.VhostUserU64: st.one_of(
        st.sampled_from([FEATURES, FEATURES & ~(1 << 30), int(PROTOCOL_FEATURES), 0, 8, 15]),
        numbers,
        words,
    ).map(u64),
    vu.VhostVringState: st.builds(state, numbers, numbers),
    vu.VhostVringAddr: st.builds(
        lambda i, f, d, u, a, g: vu.VhostVringAddr(
            index=i, flags=f, descriptor=d, used=u, available=a, log=g
        ).build(),
        numbers, st.integers(0, 1), *[st.one_of(ring_words, words)] * 3, words,
    ),
    vu.VhostUserMemRegMsg: st.builds(
        lambda g, s, u, o: bytes(8) + vu.VhostUserMemoryRegion(
            guest_address=g, size=s, user_address=u, mmap_offset=o
        ).build(),
        words, st.one_of(st.just(MIB), words), st.one_of(st.just(USER), words), words,
    ),
    vu.VhostUserLog: st.builds(
        lambda s, o: vu.VhostUserLog(mmap_size=s, mmap_offset=o).build(), words, words
    ),
    vu.VhostUserConfig: st.builds(
        lambda o, s, f, r: vu.VhostUserConfig(offset=o, size=s, flags=f, region=r).build(),
        numbers, numbers, numbers, st.binary(max_size=32),
    ),
    vu.VhostUserInflight: st.builds(
        lambda s, o, n, q: vu.VhostUserInflight(
            mmap_size=s, mmap_offset=o, num_queues=n & 0xFFFF, queue_size=q & 0xFFFF
        ).build(),
        words, words, numbers, numbers,
    ),
    vu.VhostUserTransferDeviceState: st.builds(state, numbers, numbers),
}  # fmt: skip


class Conversation(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        logging.disable(logging.CRITICAL)
        gc.collect()
        self.before = len(os.listdir("/proc/self/fd"))
        self.guest = memfd(MIB)
        self.device = EchoDevice(hold=1)
        self.connect()

    def connect(self):
        self.io = FakeIo()
        self.backend = VhostUserBackend(self.device, self.io, ring_features=EVERY_RING)

    def reconnect(self):
        """Another front-end, that gets to the interesting part at once."""
        self.backend.close()
        self.connect()
        self.negotiate(FEATURES & ~(1 << 34))
        self.memory()

    def teardown(self):
        self.backend.close()
        assert not self.io.watched
        os.close(self.guest)
        logging.disable(logging.NOTSET)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= self.before, "descriptors leaked"

    def send(self, request, payload, fds=0, flags=1, fd_kind="eventfd"):
        session = self.backend.session
        need = bool(flags & 8) and P.REPLY_ACK in session.protocol_features
        begins = request == Request.SET_PROTOCOL_FEATURES and flags & 8
        handed = [self.descriptor(fd_kind) for _ in range(fds)]
        header = vu.VhostUserHeader(request=request, flags=flags, size=len(payload)).build()
        session.feed(header + payload, handed)
        self.io.run()
        replies = session.take_output()
        for data, sent in replies:
            for fd in sent:
                os.close(fd)
            head = vu.VhostUserHeader.parse(data[:12])
            assert (head.request, head.flags) == (request, 5)
            assert head.size == len(data) - 12
            rule_ = vu.MESSAGES.get(Request(request)) if request in set(Request) else None
            size = (rule_.reply if rule_ and rule_.reply else vu.VhostUserU64).SIZE
            assert head.size in (size, 8, 0) or size == -1
        own = request in set(Request) and vu.MESSAGES.get(Request(request), None)
        need |= bool(begins and P.REPLY_ACK in session.protocol_features)
        due = need or bool(own and own.reply)
        assert len(replies) == due or (not session.is_open and not replies)
        if not session.is_open:
            self.reconnect()
        return [data[12:] for data, _ in replies]

    def descriptor(self, kind):
        if kind == "eventfd":
            return os.eventfd(0, os.EFD_NONBLOCK)
        return os.dup(self.guest)

    # -- what a good front-end does, so that the bad things meet a device that is up

    @initialize(features=st.sampled_from([FEATURES, FEATURES & ~(1 << 34), FEATURES & ~(1 << 30)]))
    def negotiate(self, features):
        self.send(Request.SET_PROTOCOL_FEATURES, u64(int(PROTOCOL_FEATURES)))
        self.send(Request.SET_FEATURES, u64(features & ~(1 << 26)))

    @rule()
    def memory(self):
        region = vu.VhostUserMemoryRegion(
            guest_address=0, size=MIB, user_address=USER, mmap_offset=0
        )
        self.send(Request.ADD_MEM_REG, bytes(8) + region.build(), 1, 9, "memory")

    @rule(index=st.integers(0, 2), base=st.sampled_from([0, 0x80008000, 3]), at=st.integers(0, 60))
    def start_ring(self, index, base, at):
        where = USER + at * 4 * 4096
        self.send(Request.SET_VRING_NUM, state(index, 16), flags=9)
        self.send(Request.SET_VRING_BASE, state(index, base), flags=9)
        addr = vu.VhostVringAddr(
            index=index,
            flags=index & 1,
            descriptor=where,
            available=where + 4096,
            used=where + 8192,
            log=at * 4096,
        )
        self.send(Request.SET_VRING_ADDR, addr.build(), flags=9)
        self.send(Request.SET_VRING_KICK, u64(index), 1, 9)
        self.send(Request.SET_VRING_CALL, u64(index), 1, 9)
        self.send(Request.SET_VRING_ENABLE, state(index, 1), flags=9)

    @rule(index=st.integers(0, 2))
    def stop_ring(self, index):
        self.send(Request.GET_VRING_BASE, state(index, 0))
        assert index not in self.backend.queues or not self.backend.vrings[index].started

    @rule(queues=st.integers(1, 3))
    def inflight_area(self, queues):
        wish = vu.VhostUserInflight(
            mmap_size=0, mmap_offset=0, num_queues=queues, queue_size=16
        ).build()
        answer = self.send(Request.GET_INFLIGHT_FD, wish)
        if answer and vu.VhostUserInflight.parse(answer[0]).mmap_size:
            told = vu.VhostUserInflight.parse(answer[0])
            told.mmap_size = min(told.mmap_size, MIB)
            self.send(Request.SET_INFLIGHT_FD, told.build(), 1, 9, "memory")

    # -- the guest

    @rule(page=st.integers(0, 255), junk=st.binary(min_size=1, max_size=64))
    def scribble(self, page, junk):
        os.pwrite(self.guest, junk, page * 4096)

    @rule(index=st.integers(0, 2))
    def kick(self, index):
        kick = self.backend.vrings[index].kick
        if kick in self.io.watched:
            self.io.watched[kick]()
            self.io.run()

    # -- anything at all

    @rule(data=st.data(), request=st.sampled_from(list(vu.MESSAGES)))
    def any_message(self, data, request):
        of = vu.MESSAGES[request]
        payload = b""
        if of.payload is vu.VhostUserMemory:
            payload = data.draw(st.binary(max_size=16))
        elif of.payload is not None:
            known = PAYLOADS.get(of.payload, st.binary(min_size=32, max_size=32))
            payload = data.draw(st.one_of(known, known, st.binary(max_size=48)))
        fds = data.draw(st.one_of(st.just(of.fds[1]), st.integers(0, 3)))
        flags = data.draw(st.sampled_from([1, 9, 9]))
        kind = data.draw(st.sampled_from(["eventfd", "memory"]))
        self.send(request, payload, fds, flags, kind)

    @rule(
        payload=st.binary(max_size=64), request=st.integers(0, 1 << 32 - 1), fds=st.integers(0, 9)
    )
    def nonsense(self, payload, request, fds):
        if fds == 9:
            handed = [self.descriptor("eventfd") for _ in range(fds)]
            self.backend.session.feed(b"x", handed)
            assert not self.backend.session.is_open
            self.reconnect()
        elif request not in set(Request):
            self.send(request & 0xFFFFFFFF, payload, fds, 9)

    @rule(junk=st.binary(min_size=12, max_size=40))
    def not_vhost_user(self, junk):
        flags = int.from_bytes(junk[4:8], "little")
        if flags & 3 != 1:
            self.backend.session.feed(junk)
            assert not self.backend.session.is_open
            assert self.backend.session.take_output() == []
            self.reconnect()

    @rule()
    def go_away(self):
        self.backend.session.receive_eof()
        self.reconnect()

    # -- always true

    @invariant()
    def a_stopped_ring_is_not_in_use(self):
        for vring in self.backend.vrings:
            if not (vring.started and vring.enabled):
                assert vring.index not in self.backend.queues
            if vring.kick is None:
                continue
            broken = self.backend.rings.set.record(vring.index).broken
            assert broken is not None or vring.kick in self.io.watched or not vring.started

    @invariant()
    def the_device_knows_this_front_end(self):
        assert self.device.transport is self.backend


TestConversation = Conversation.TestCase
TestConversation.settings = settings(
    max_examples=int(os.environ.get("VHOST_USER_FUZZ", "40")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
