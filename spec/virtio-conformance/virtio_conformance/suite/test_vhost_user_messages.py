# SPDX-License-Identifier: Apache-2.0
"""Malformed messages and a misbehaving front-end get an error or a closed connection."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from virtio_conformance.findings import Closed, Hang, about, not_applicable, require
from virtio_conformance.observe import EventFd
from virtio_conformance.rig_vhost_user import VhostUserRig
from virtio_formats.vhost_user.header import VhostUserHeader
from virtio_formats.vhost_user.payloads import (
    VhostUserConfig,
    VhostUserInflight,
    VhostUserU64,
    VhostVringAddr,
    VhostVringState,
)
from virtio_formats.vhost_user.requests import Request

MakeRig = Callable[..., VhostUserRig]
PLAIN = [r for r in Request if r not in (Request.POSTCOPY_ADVISE, Request.POSTCOPY_LISTEN)]


def negotiated(rig: VhostUserRig) -> VhostUserRig:
    """Negotiate VERSION_1 and share memory."""
    rig.negotiate((1 << 32) & rig.offered)
    return rig


def poke(
    rig: VhostUserRig, request: int, payload: bytes = b"", fds: Sequence[int] = (), **how: Any
) -> None:
    """Send something that may be refused by any means but a hang."""
    try:
        rig.fe.send(request, payload, fds, **how)
        rig.fe.usable()
    except Closed:
        pass


def next_one(rig: VhostUserRig, new_rig: MakeRig) -> None:
    """Disconnect; the next front-end is served like the first (if the back-end still runs)."""
    rig.survive()
    rig.leave()
    if rig.target.ends_after_a_connection():
        return
    with about("vu.reconnect"):
        fresh = new_rig(False)
        negotiated(fresh)


@pytest.mark.requirement("vu.robust.size")
@pytest.mark.parametrize("request_type", PLAIN, ids=lambda r: r.name)
def test_payload_missing(split_rig: VhostUserRig, new_rig: MakeRig, request_type: Request) -> None:
    """Each request with no payload at all."""
    rig = negotiated(split_rig)
    poke(rig, request_type, need_reply=bool(rig.fe.protocol & 8))
    next_one(rig, new_rig)


@pytest.mark.requirement("vu.robust.size")
@pytest.mark.parametrize("request_type", PLAIN, ids=lambda r: r.name)
def test_payload_too_long(split_rig: VhostUserRig, new_rig: MakeRig, request_type: Request) -> None:
    """Each request with 300 bytes of payload."""
    rig = negotiated(split_rig)
    poke(rig, request_type, bytes(range(150)) * 2)
    next_one(rig, new_rig)


@pytest.mark.requirement("vu.robust.size")
@pytest.mark.parametrize("size", [4097, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF])
def test_size_beyond_all_messages(split_rig: VhostUserRig, new_rig: MakeRig, size: int) -> None:
    """A header with an impossible size does not make the back-end wait forever."""
    rig = negotiated(split_rig)
    try:
        rig.fe.send(Request.SET_FEATURES, bytes(64), size=size)
        closed = rig.fe.tap.wait_closed(1.0)
    except Closed:
        closed = True
    rig.target.expect_healthy()
    require(closed, f"the back-end waits for a payload of {size} bytes")
    next_one(rig, new_rig)


@pytest.mark.requirement("vu.robust.unknown")
@pytest.mark.parametrize("number", [0, 45, 255, 0x10000, 0xFFFFFFFF])
@pytest.mark.parametrize("ack", [False, True], ids=["plain", "need-reply"])
def test_unknown_request(split_rig: VhostUserRig, new_rig: MakeRig, number: int, ack: bool) -> None:
    """Requests that no standard knows."""
    rig = negotiated(split_rig)
    poke(rig, number, bytes(8), need_reply=ack)
    next_one(rig, new_rig)


@pytest.mark.requirement("vu.robust.version")
@pytest.mark.parametrize("version", [0, 2, 3])
def test_other_version(split_rig: VhostUserRig, new_rig: MakeRig, version: int) -> None:
    """A header of another version is not answered as if it were ours."""
    rig = negotiated(split_rig)
    try:
        rig.fe.send(Request.GET_FEATURES, flags=version)
        answer = rig.fe.receive(0.3)
        require(len(answer.payload) != 8 or answer.u64 != rig.fe.features, "it is answered")
    except (Closed, Hang):
        pass
    next_one(rig, new_rig)


@pytest.mark.requirement("vu.robust.reply-flag")
@pytest.mark.parametrize("flags", [1 | 4, 0xFFFFFFF9])
def test_header_flags(split_rig: VhostUserRig, new_rig: MakeRig, flags: int) -> None:
    """The reply flag and reserved flags in a request."""
    rig = negotiated(split_rig)
    poke(rig, Request.GET_FEATURES, flags=flags)
    next_one(rig, new_rig)


RING_REQUESTS = [
    Request.SET_VRING_NUM,
    Request.SET_VRING_BASE,
    Request.GET_VRING_BASE,
    Request.SET_VRING_ENABLE,
    Request.SET_VRING_KICK,
    Request.SET_VRING_CALL,
    Request.SET_VRING_ERR,
    Request.SET_VRING_ADDR,
]


@pytest.mark.requirement("vu.robust.queue-index")
@pytest.mark.parametrize("index", [63, 255, 1024, 65536, 0xFFFFFFFF])
@pytest.mark.parametrize("request_type", RING_REQUESTS, ids=lambda r: r.name)
def test_queue_index_out_of_range(
    split_rig: VhostUserRig, new_rig: MakeRig, request_type: Request, index: int
) -> None:
    """Queues that do not exist."""
    rig = negotiated(split_rig)
    event = EventFd()
    fds = []
    if request_type in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        payload, fds = VhostUserU64(u64=index & ~0x100).build(), [event.fd]
    elif request_type == Request.SET_VRING_ADDR:
        user = rig.ram.regions[0].user
        payload = VhostVringAddr(
            index=index, flags=0, descriptor=user, used=user + 8192, available=user + 4096, log=0
        ).build()
    else:
        payload = VhostVringState(index=index, num=1).build()
    poke(rig, request_type, payload, fds)
    event.close()
    next_one(rig, new_rig)


WITH_FD = [
    Request.SET_VRING_KICK,
    Request.SET_VRING_CALL,
    Request.SET_VRING_ERR,
    Request.SET_LOG_FD,
    Request.SET_BACKEND_REQ_FD,
    Request.SET_LOG_BASE,
    Request.ADD_MEM_REG,
    Request.SET_INFLIGHT_FD,
    Request.SET_DEVICE_STATE_FD,
]


@pytest.mark.requirement("vu.robust.missing-fds")
@pytest.mark.parametrize("request_type", WITH_FD, ids=lambda r: r.name)
def test_descriptor_missing(
    split_rig: VhostUserRig, new_rig: MakeRig, request_type: Request
) -> None:
    """Requests that bring a descriptor, without it."""
    rig = negotiated(split_rig)
    size = {
        Request.SET_LOG_BASE: 16,
        Request.ADD_MEM_REG: 40,
        Request.SET_INFLIGHT_FD: 24,
        Request.SET_LOG_FD: 0,
        Request.SET_BACKEND_REQ_FD: 0,
    }.get(request_type, 8)
    poke(rig, request_type, bytes(size))
    next_one(rig, new_rig)


SURPLUS = {
    Request.GET_FEATURES: b"",
    Request.SET_OWNER: b"",
    Request.GET_QUEUE_NUM: b"",
    Request.SET_FEATURES: VhostUserU64(u64=1 << 32).build(),
    Request.SET_VRING_NUM: VhostVringState(index=0, num=64).build(),
    Request.SET_VRING_BASE: bytes(8),
    Request.SET_VRING_CALL: bytes(8),
    Request.SET_VRING_ERR: bytes(8),
    Request.GET_VRING_BASE: bytes(8),
    Request.GET_CONFIG: VhostUserConfig(offset=0, size=4, flags=0, region=bytes(4)).build(),
    Request.GET_INFLIGHT_FD: VhostUserInflight(
        mmap_size=0, mmap_offset=0, num_queues=1, queue_size=64
    ).build(),
}
"""Requests that bring no descriptor, or one."""


@pytest.mark.requirement("vu.robust.surplus-fds")
@pytest.mark.parametrize("request_type", SURPLUS, ids=lambda r: r.name)
def test_surplus_descriptors(split_rig: VhostUserRig, request_type: Request) -> None:
    """Descriptors that a request does not bring are closed, not kept."""
    rig = negotiated(split_rig)
    held = len(rig.process.fds())
    event = EventFd()
    for _ in range(8):
        poke(rig, request_type, SURPLUS[request_type], [event.fd] * 5)
    event.close()
    rig.survive()
    if not rig.target.gone and rig.usable():
        # one descriptor may be kept: a call or error descriptor, or an inflight region
        require(len(rig.process.fds()) <= held + 1, f"{len(rig.process.fds()) - held} more open")


@pytest.mark.requirement("vu.robust.leak")
@pytest.mark.parametrize("request_type", RING_REQUESTS[4:7], ids=lambda r: r.name)
def test_replaced_descriptors_are_closed(split_rig: VhostUserRig, request_type: Request) -> None:
    """Setting a descriptor again closes the one before."""
    rig = negotiated(split_rig)
    held = 0
    try:
        for turn in range(13):
            event = EventFd()
            rig.fe.vring_fd(request_type, 0, event.fd)
            event.close()
            if not turn:  # a back-end can keep several descriptors for each that it got
                rig.fe.barrier()
                held = len(rig.process.fds())
        rig.fe.barrier()
    except Closed:
        return  # a ring without addresses need not be started
    rig.main_quiet(0.02)
    require(len(rig.process.fds()) <= held + 2, f"{len(rig.process.fds()) - held} more open")


@pytest.mark.requirement("vu.robust.leak")
def test_repeated_ring_setup_keeps_memory_flat(split_rig: VhostUserRig) -> None:
    """The same ring messages a thousand times do not increase memory use."""
    rig = negotiated(split_rig)
    for turn in range(1200):
        rig.fe.vring(Request.SET_VRING_NUM, 0, 64)
        rig.fe.vring(Request.SET_VRING_BASE, 0, 0)
        if turn == 200:
            rig.fe.barrier()
            before = rig.process.resident_bytes()
    rig.fe.barrier()
    grown = rig.process.resident_bytes() - before
    require(grown < 2 << 20, f"{grown} bytes more after 1000 repetitions")


@pytest.mark.requirement("vu.robust.truncated")
@pytest.mark.parametrize("length", [1, 11, 12, 15])
def test_connection_ends_within_a_message(
    split_rig: VhostUserRig, new_rig: MakeRig, length: int
) -> None:
    """A front-end that dies within a message."""
    rig = negotiated(split_rig)
    raw = VhostUserHeader(request=Request.SET_FEATURES, flags=1, size=8).build() + bytes(8)
    rig.fe.tap.send(raw[:length])
    rig.leave()
    if not rig.target.ends_after_a_connection():
        negotiated(new_rig(False))
    rig.target.expect_healthy()


@pytest.mark.requirement("vu.robust.order")
@pytest.mark.parametrize("seed", range(6))
def test_messages_in_random_order(split_rig: VhostUserRig, new_rig: MakeRig, seed: int) -> None:
    """Well-formed messages in an order that no front-end would send."""
    rig, dice = negotiated(split_rig), random.Random(seed)
    event = EventFd()
    user = rig.ram.regions[0].user
    state = VhostVringState
    menu: list[Callable[[], tuple[int, bytes, list[int]]]] = [
        lambda: (Request.SET_VRING_NUM, state(index=0, num=dice.choice([16, 64])).build(), []),
        lambda: (Request.SET_VRING_BASE, state(index=0, num=dice.randrange(65536)).build(), []),
        lambda: (Request.SET_VRING_ENABLE, state(index=0, num=dice.randrange(2)).build(), []),
        lambda: (Request.SET_VRING_KICK, VhostUserU64(u64=0).build(), [event.fd]),
        lambda: (Request.SET_VRING_CALL, VhostUserU64(u64=0).build(), [event.fd]),
        lambda: (Request.SET_VRING_ADDR, VhostVringAddr(
            index=0, flags=dice.randrange(2), descriptor=user, used=user + 8192,
            available=user + 4096, log=dice.choice([0, 1 << 50])).build(), []),
        lambda: (Request.SET_FEATURES, VhostUserU64(u64=rig.fe.acked).build(), []),
        lambda: (Request.SET_OWNER, b"", []),
        lambda: (Request.RESET_OWNER, b"", []),
    ]  # fmt: skip
    try:
        for _ in range(60):
            request, payload, fds = dice.choice(menu)()
            rig.fe.send(request, payload, fds)
            if dice.random() < 0.2:
                event.signal()
            if dice.random() < 0.15:
                rig.fe.send(Request.GET_VRING_BASE, state(index=0, num=0).build())
        rig.fe.usable()
    except Closed:
        pass
    event.close()
    rig.survive(spinning=True)
    next_one(rig, new_rig)


@pytest.mark.requirement("vu.robust.size", "vu.robust.unknown")
@pytest.mark.parametrize("seed", range(6))
def test_random_bytes(split_rig: VhostUserRig, new_rig: MakeRig, seed: int) -> None:
    """Random bytes instead of messages."""
    dice = random.Random(seed)
    try:
        split_rig.fe.tap.send(dice.randbytes(3000))
        split_rig.fe.tap.wait_closed(0.2)
    except (Closed, Hang):
        pass
    split_rig.leave()
    split_rig.target.expect_healthy()
    if not split_rig.target.gone and not split_rig.target.ends_after_a_connection():
        negotiated(new_rig(False))


# -- the program -----------------------------------------------------------------------------


@pytest.mark.requirement("vu.robust.idle-cpu")
def test_idle_backend(rig: VhostUserRig) -> None:
    """With running rings and nothing to do, no processor time is used."""
    if rig.target.options.polls:
        not_applicable("the back-end polls by design")
    rig.bring_up()
    rig.warm_up()
    rig.main_quiet(0.1)
    share = min(rig.process.cpu_share(0.3), rig.process.cpu_share(0.3))
    require(share < 0.1, f"{share:.0%} of a processor while idle")


@pytest.mark.requirement("vu.reconnect", "vu.robust.leak")
def test_many_connections(new_rig: MakeRig) -> None:
    """Each of many front-ends is served, and none leaves descriptors or mappings."""
    rig = new_rig(False)
    rig.bring_up()
    rig.warm_up()
    rig.leave()
    if rig.target.ends_after_a_connection():
        not_applicable("the back-end serves one connection and ends")
    held = -1
    for turn in range(5):
        with about("vu.reconnect"):
            rig = new_rig(False)
            rig.bring_up()
            rig.run([rig.profile.exchange(rig, 0)])
        if turn == 1:
            held = len(rig.process.fds())
        if turn == 4:
            for _ in range(100):  # those of the front-end before may be closed a moment later
                now = len(rig.process.fds())
                if now <= held:
                    break
                rig.main_quiet(0.02)
            require(now <= held, f"{now - held} more open", row="vu.robust.leak")
        rig.leave()


@pytest.mark.requirement("vu.reconnect")
@pytest.mark.parametrize("moment", ["handshake", "memory", "rings", "work"])
def test_front_end_dies_at_any_moment(new_rig: MakeRig, moment: str) -> None:
    """A front-end that is gone at some moment does not keep the next one out."""
    rig = new_rig(False)
    if moment == "memory":
        negotiated(rig)
    elif moment == "rings":
        rig.bring_up(ready=False)
    elif moment == "work":
        rig.bring_up()
        for serial in range(8):
            rig.submit(rig.request(serial))
        rig.main.publish()
        rig.kick(rig.profile.main)
    rig.leave()
    rig.target.expect_healthy()
    if rig.target.ends_after_a_connection():
        not_applicable("the back-end serves one connection and ends")
    with about("vu.reconnect"):
        fresh = new_rig(False)
        fresh.bring_up()
        fresh.run([fresh.profile.exchange(fresh, 1)])
    if not rig.target.options.polls:
        require(fresh.process.settles(), "the back-end uses a whole processor")


@pytest.mark.requirement("vu.program.sigterm", "vu.program.no-daemon")
@pytest.mark.parametrize("moment", ["idle", "running"])
def test_sigterm(new_rig: MakeRig, moment: str) -> None:
    """The program stays in the foreground and ends on SIGTERM, in whatever state."""
    rig = new_rig(False)
    if rig.target.popen is None:
        not_applicable("the back-end was not started by the suite")
    if moment == "running":
        rig.bring_up()
    row = "vu.program.no-daemon"
    require(not rig.target.gone, "the program went into the background", row=row)
    require(
        rig.process.pid == rig.target.popen.pid
        or os.getpgid(rig.process.pid) == rig.target.popen.pid,
        "another program serves the socket",
        row=row,
    )
    rig.target.popen.terminate()
    for _ in range(150):
        if rig.target.gone:
            return
        rig.main_quiet(0.01)
    require(False, "SIGTERM does not end it within 1.5 s")
