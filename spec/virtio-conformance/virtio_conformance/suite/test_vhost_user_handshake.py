# SPDX-License-Identifier: Apache-2.0
"""The control socket: handshake, replies, acknowledgements, configuration, status."""

from __future__ import annotations

import os
import socket

import pytest

from virtio_conformance.findings import Closed, Hang, about, not_applicable, require
from virtio_conformance.rig_vhost_user import COMMON_PROTOCOL, VhostUserRig
from virtio_conformance.target import Options
from virtio_conformance.vhost_user import FrontEnd
from virtio_formats.vhost_user.features import ProtocolFeature as P
from virtio_formats.vhost_user.features import VhostFeature
from virtio_formats.vhost_user.header import VhostUserHeader
from virtio_formats.vhost_user.payloads import VhostUserU64, VhostVringState
from virtio_formats.vhost_user.requests import BackendRequest, Request

V1 = 1 << 32


def ready(rig: VhostUserRig, protocol: int = COMMON_PROTOCOL) -> FrontEnd:
    """Return a front-end that has negotiated VERSION_1 and shared memory."""
    rig.protocol = protocol
    rig.negotiate(V1 & rig.offered)
    return rig.fe


def word(value: int) -> bytes:
    """Return a 64-bit payload."""
    return VhostUserU64(u64=value).build()


@pytest.mark.requirement("vu.features.get", "vu.header.reply")
def test_get_features(split_rig: VhostUserRig) -> None:
    """GET_FEATURES answers 64 bits, the same each time, also later."""
    fe = split_rig.fe
    first = fe.get_u64(Request.GET_FEATURES)
    require(first == fe.get_u64(Request.GET_FEATURES), "two answers differ")
    ready(split_rig)
    require(first == fe.get_u64(Request.GET_FEATURES), "the offer changed with SET_FEATURES")


@pytest.mark.requirement(
    "vu.protocol-features.early-get",
    "vu.protocol-features.early-set",
    "vu.protocol-features.known",
    "vu.mq.offered",
    "vu.base.inflight-pair",
)
def test_protocol_features(split_rig: VhostUserRig) -> None:
    """Protocol features can be read and taken before SET_FEATURES; they are known ones."""
    fe = split_rig.fe
    if not fe.get_u64(Request.GET_FEATURES) & VhostFeature.PROTOCOL_FEATURES:
        not_applicable("protocol features are not offered")
    offered = fe.get_u64(Request.GET_PROTOCOL_FEATURES)
    known = sum(P)
    fe.send(Request.SET_PROTOCOL_FEATURES, word(offered & COMMON_PROTOCOL))
    told = "SET_PROTOCOL_FEATURES before SET_FEATURES ends the connection"
    require(fe.usable(), told, row="vu.protocol-features.early-set")
    if offered & P.GET_VRING_BASE_INFLIGHT:
        told = "GET_VRING_BASE_INFLIGHT is offered without INFLIGHT_SHMFD"
        require(offered & P.INFLIGHT_SHMFD, told, row="vu.base.inflight-pair")
    told = f"unknown protocol features {offered & ~known:#x}"
    require(not offered & ~known, told, row="vu.protocol-features.known")
    require(offered & P.MQ, "PROTOCOL_F_MQ is not offered", row="vu.mq.offered")


@pytest.mark.requirement("vu.mq.queue-num")
def test_queue_num(split_rig: VhostUserRig) -> None:
    """GET_QUEUE_NUM answers at least what the device type needs."""
    split_rig.need_protocol(P.MQ)
    fe = ready(split_rig)
    count = fe.get_u64(Request.GET_QUEUE_NUM)
    due = max(split_rig.profile.queues, default=0) + 1
    due = 1 if split_rig.profile.name == "net" else due  # pairs
    require(due <= count <= 65535, f"GET_QUEUE_NUM answers {count}, at least {due} is due")


@pytest.mark.requirement("vu.header.split-delivery")
@pytest.mark.parametrize("chunk", [1, 5, 13])
def test_messages_in_pieces(split_rig: VhostUserRig, chunk: int) -> None:
    """A message that arrives in pieces is one message."""
    fe = ready(split_rig)
    raw = VhostUserHeader(request=Request.SET_FEATURES, flags=1, size=8).build() + word(fe.acked)
    raw += VhostUserHeader(request=Request.GET_FEATURES, flags=1, size=0).build()
    for start in range(0, len(raw), chunk):
        fe.tap.send(raw[start : start + chunk])
        if start < 20:
            fe.tap.silent(0.002)
    require(fe.expect_reply(Request.GET_FEATURES).u64 == fe.features, "another answer")


@pytest.mark.requirement("vu.header.split-delivery", "vu.header.reply")
def test_several_messages_at_once(split_rig: VhostUserRig) -> None:
    """Messages that arrive in one piece are answered one by one, in order."""
    fe = ready(split_rig)
    raw = VhostUserHeader(request=Request.GET_FEATURES, flags=1, size=0).build()
    fe.tap.send(raw * 20)
    for _ in range(20):
        require(fe.expect_reply(Request.GET_FEATURES).u64 == fe.features, "another answer")
    require(fe.tap.silent(0.05), "more replies than requests")


@pytest.mark.requirement("vu.reply-ack", "vu.reply-ack.value")
def test_acknowledgements(split_rig: VhostUserRig) -> None:
    """With REPLY_ACK each request that asks for it gets exactly one reply, zero if it was good."""
    split_rig.need_protocol(P.REPLY_ACK)
    fe = ready(split_rig)
    for request, payload in (
        (Request.SET_FEATURES, word(fe.acked)),
        (Request.SET_VRING_NUM, VhostVringState(index=0, num=64).build()),
        (Request.SET_PROTOCOL_FEATURES, word(int(fe.protocol))),
    ):
        fe.send(request, payload, need_reply=True)
        told = f"{request.name} was refused"
        require(fe.expect_reply(request).u64 == 0, told, row="vu.reply-ack.value")
    require(fe.tap.silent(0.05), "a second reply")


@pytest.mark.requirement("vu.reply-ack")
def test_need_reply_on_requests_that_answer_anyway(split_rig: VhostUserRig) -> None:
    """NEED_REPLY on a request with a reply of its own changes nothing."""
    split_rig.need_protocol(P.REPLY_ACK)
    fe = ready(split_rig)
    fe.send(Request.GET_FEATURES, need_reply=True)
    require(fe.expect_reply(Request.GET_FEATURES).u64 == fe.features, "another answer")
    require(fe.tap.silent(0.05), "a second reply")


@pytest.mark.requirement("vu.reply-ack.none")
def test_no_reply_where_none_is_asked_for(split_rig: VhostUserRig) -> None:
    """Without NEED_REPLY a request without a reply of its own stays unanswered."""
    fe = ready(split_rig)
    fe.send(Request.SET_FEATURES, word(fe.acked))
    fe.send(Request.SET_VRING_NUM, VhostVringState(index=0, num=64).build())
    require(fe.tap.silent(0.05), "a reply that nobody asked for")
    require(fe.usable(), "the connection ended")


@pytest.mark.requirement("vu.reply-ack.value")
def test_refusals_are_not_zero(split_rig: VhostUserRig) -> None:
    """A request that cannot be done is not acknowledged with zero."""
    split_rig.need_protocol(P.REPLY_ACK)
    split_rig.need_protocol(P.CONFIGURE_MEM_SLOTS)
    fe = ready(split_rig)
    stranger = split_rig.ram.regions[0]
    moved = type(stranger)(
        0x7000_0000_0000, stranger.size, 0x7000_0000_0000, 0, stranger.fd, 0, stranger.view
    )
    try:
        verdict = fe.remove_region(moved)
    except Closed:
        return
    require(verdict, "REM_MEM_REG of a region that does not exist is acknowledged with zero")


@pytest.mark.requirement("vu.reply-ack.value")
@pytest.mark.parametrize(
    "request_type", [Request.SET_VRING_NUM, Request.SET_VRING_ENABLE], ids=lambda r: r.name
)
def test_bad_queue_index_is_not_acknowledged(
    split_rig: VhostUserRig, request_type: Request
) -> None:
    """A request for a queue that does not exist is not acknowledged with zero."""
    split_rig.need_protocol(P.REPLY_ACK)
    fe = ready(split_rig)
    try:
        verdict = fe.attempt(request_type, VhostVringState(index=4000, num=1).build())
    except Closed:
        return
    require(verdict, f"{request_type.name} of queue 4000 is acknowledged with zero")


@pytest.mark.requirement("vu.backend-channel.ack")
def test_backend_channel(split_rig: VhostUserRig) -> None:
    """The back-end channel's descriptor is acknowledged; no unsolicited message is sent."""
    split_rig.need_protocol(P.BACKEND_REQ)
    fe = ready(split_rig)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fe.do(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        theirs.close()
        ours.settimeout(0.1)
        try:
            require(ours.recv(1, socket.MSG_PEEK), "the back-end closed its channel at once")
        except TimeoutError:
            pass
        require(fe.usable(), "the connection ended")


@pytest.mark.requirement("vu.backend.iotlb-gated", "vu.backend.notifier-gated")
def test_nothing_unasked_on_the_backend_channel(split_rig: VhostUserRig) -> None:
    """While requests are served no IOTLB and no host notifier message is sent."""
    rig = split_rig
    rig.need_protocol(P.BACKEND_REQ)
    rig.bring_up()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        rig.fe.do(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        theirs.close()
        for serial in range(5):
            rig.run([rig.profile.exchange(rig, serial)])
        ours.settimeout(0.1)
        try:
            raw = ours.recv(12)
        except TimeoutError:
            return
    header = VhostUserHeader.parse(raw)
    row = "vu.backend.notifier-gated" if header.request == 3 else "vu.backend.iotlb-gated"
    told = f"back-end request {header.request} was not negotiated"
    require(header.request not in (1, 3), told, row=row)


@pytest.mark.requirement("vu.backend.config-change", "vu.suspended")
def test_configuration_change_is_announced(split_rig: VhostUserRig, options: Options) -> None:
    """A change brings CONFIG_CHANGE_MSG on the back-end channel, but not while suspended."""
    rig = split_rig
    if not options.config_change:
        not_applicable("--config-change says how to make the device change its configuration")
    rig.need_protocol(P.BACKEND_REQ)
    rig.need_protocol(P.CONFIG)
    rig.bring_up()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        rig.fe.do(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        theirs.close()
        ours.settimeout(2.0)
        rig.change_configuration()
        header = VhostUserHeader.parse(ours.recv(12))
        require(header.request == BackendRequest.CONFIG_CHANGE_MSG, f"request {header.request}")
        require(header.size == 0, f"a payload of {header.size} bytes")
        for index in rig.rings:
            rig.stop_ring(index)
        ours.settimeout(0.15)
        rig.change_configuration()
        try:
            require(not ours.recv(12), "a message from a suspended device", row="vu.suspended")
        except TimeoutError:
            pass


@pytest.mark.requirement("vu.inband.needs-both")
def test_in_band_notifications_need_two_more(split_rig: VhostUserRig) -> None:
    """In-band notifications without the channel and REPLY_ACK end the connection."""
    split_rig.need_protocol(P.INBAND_NOTIFICATIONS)
    fe = split_rig.fe
    fe.send(Request.SET_PROTOCOL_FEATURES, word(int(P.INBAND_NOTIFICATIONS)))
    require(fe.tap.wait_closed(1.0), "the connection stays open")


@pytest.mark.requirement("vu.config.get-size")
def test_get_config_sizes(split_rig: VhostUserRig) -> None:
    """GET_CONFIG answers with the size asked for, at any offset; else with an empty payload."""
    rig = split_rig
    rig.need_protocol(P.CONFIG)
    fe = ready(rig)
    size = rig.profile.config_size or 4
    whole = fe.get_config(0, size)
    require(len(whole) == size, f"{len(whole)} bytes for {size}")
    for offset in range(0, size, 4):
        part = fe.get_config(offset, 4)
        require(part in (whole[offset : offset + 4], b""), f"another value at offset {offset}")
    for offset, count in ((0, 256), (252, 4), (255, 1)):
        answer = fe.get_config(offset, count)
        require(len(answer) in (0, count), f"{len(answer)} bytes for {count} at {offset}")
    for offset, count in ((0xFFFFFFFF, 4), (256, 4), (4, 0xFFFFFFFF)):
        payload = offset.to_bytes(4, "little") + count.to_bytes(4, "little") + bytes(4 + 4)
        try:
            fe.send(Request.GET_CONFIG, payload)
            reply = fe.expect_reply(Request.GET_CONFIG)
            require(len(reply.payload) <= 4 + 12, "an answer beyond the configuration space")
        except Closed:
            return


@pytest.mark.requirement("vu.config.read-only", "vu.config.flags")
def test_set_config_of_read_only_fields(split_rig: VhostUserRig) -> None:
    """Read-only fields stay as they are, whether the write is refused or ignored."""
    rig = split_rig
    rig.need_protocol(P.CONFIG)
    places = {"balloon": [(0, 4), (8, 4)], "blk": [(0, 8)], "vsock": [(0, 8)], "fs": [(0, 36)]}
    if rig.profile.name not in places:
        not_applicable("no read-only field of this device is known")
    fe = ready(rig)
    for offset, size in places[rig.profile.name]:
        before = fe.get_config(offset, size)
        try:
            fe.set_config(offset, bytes([0x77]) * size)
            after = fe.get_config(offset, size)
        except Closed:
            return
        require(after == before, f"read-only field at {offset} now reads {after.hex()}")


@pytest.mark.requirement("vu.robust.size")
@pytest.mark.parametrize("offset", [0, 8, 60, 252, 0xFFFFFFFC])
def test_set_config_that_makes_no_sense(split_rig: VhostUserRig, offset: int) -> None:
    """Writes beyond the configuration space and unknown flags do no harm."""
    split_rig.need_protocol(P.CONFIG)
    fe = ready(split_rig)
    try:
        fe.set_config(offset, b"\xee" * 64, flags=0x7FFFFFFF)
        fe.set_config(offset, b"\xee" * 64)
    except Closed:
        pass
    fe.usable()


@pytest.mark.requirement("vu.status")
def test_status(split_rig: VhostUserRig) -> None:
    """With PROTOCOL_F_STATUS the status written is the one read."""
    split_rig.need_protocol(P.STATUS)
    fe = ready(split_rig)
    for status in (1, 3, 11):
        fe.do(Request.SET_STATUS, word(status))
        got = fe.get_u64(Request.GET_STATUS)
        require(got & 0xFF == status, f"status {status} reads {got}")


@pytest.mark.requirement("vu.reset-owner")
def test_reset_owner(split_rig: VhostUserRig) -> None:
    """RESET_OWNER does not lose the connection state."""
    fe = ready(split_rig)
    fe.send(Request.RESET_OWNER)
    require(fe.usable(), "RESET_OWNER ends the connection")


@pytest.mark.requirement("vu.close-rarely", "program.healthy")
def test_a_whole_session_stays_open(split_rig: VhostUserRig) -> None:
    """A correct session keeps its connection from handshake to stop."""
    rig = split_rig
    rig.bring_up()
    for serial in range(3):
        rig.run([rig.profile.exchange(rig, serial)])
    for index in rig.rings:
        rig.stop_ring(index)
    rig.fe.barrier()
    require(rig.fe.tap.silent(0.05), "a message that nobody asked for")


@pytest.mark.requirement("vu.robust.order")
@pytest.mark.parametrize("request_type", list(Request), ids=lambda r: r.name)
def test_any_request_first(split_rig: VhostUserRig, request_type: Request) -> None:
    """Any request as the first one, before all negotiation, does no harm."""
    fe = split_rig.fe
    try:
        fe.send(request_type, bytes(8))
        fe.usable()
    except Closed:
        pass
    except Hang:
        # the back-end may be waiting for the rest of a message: send it
        try:
            fe.tap.send(bytes(4096))
            fe.tap.wait_closed(0.3)
        except Closed:
            pass
    split_rig.target.expect_healthy()


@pytest.mark.requirement("vu.state.pipe", "vu.state.error-without-fd", "vu.state.read-all")
def test_device_state_saved(split_rig: VhostUserRig) -> None:
    """Saving writes the state to the channel and ends it; CHECK says that it went well."""
    rig = split_rig
    rig.need_protocol(P.DEVICE_STATE)
    state = save_state(rig)
    require(len(state) < 1 << 24, f"{len(state)} bytes of state")


def save_state(rig: VhostUserRig) -> bytes:
    """Bring a device up, stop it, and read its state."""
    rig.protocol = COMMON_PROTOCOL | P.DEVICE_STATE
    rig.bring_up()
    rig.warm_up()
    for index in rig.rings:
        rig.stop_ring(index)
    reader, writer = os.pipe()
    reply = rig.fe.ask(Request.SET_DEVICE_STATE_FD, bytes(8), [writer])
    os.close(writer)
    if reply.fds:
        told = "a descriptor together with an error"
        require(reply.u64 == 0, told, row="vu.state.error-without-fd")
        os.close(reader)
        reader = reply.fds[0]
    else:
        require(reply.u64 & 0x1FF == 0x100, f"SET_DEVICE_STATE_FD answers {reply.u64:#x}")
    with open(reader, "rb") as pipe:
        state = pipe.read()
    require(rig.fe.get_u64(Request.CHECK_DEVICE_STATE) == 0, "CHECK_DEVICE_STATE reports an error")
    return state


@pytest.mark.requirement("vu.state.load", "vu.state.transparent", "vu.state.read-all")
def test_device_state_loaded(split_rig: VhostUserRig, new_rig: object) -> None:
    """A saved state can be loaded again, and the device continues at its ring positions."""
    rig = split_rig
    rig.need_protocol(P.DEVICE_STATE)
    state = save_state(rig)
    ring, base = rig.main, rig.main.base
    load_state(rig, state)
    with about("vu.state.transparent"):
        for index, other in list(rig.rings.items()):
            rig.start_ring(index, other, base=base if other is ring else None)
        rig.run([rig.profile.exchange(rig, 1)])


def load_state(rig: VhostUserRig, state: bytes) -> None:
    """Write a state into a stopped device; it has to take it."""
    reader, writer = os.pipe()
    reply = rig.fe.ask(Request.SET_DEVICE_STATE_FD, (1).to_bytes(4, "little") + bytes(4), [reader])
    os.close(reader)
    require(reply.u64 & 0xFF == 0, f"SET_DEVICE_STATE_FD answers {reply.u64:#x}")
    with open(writer, "wb") as pipe:
        pipe.write(state)
    require(rig.fe.get_u64(Request.CHECK_DEVICE_STATE) == 0, "the state was not taken")


@pytest.mark.requirement("vu.state.load")
def test_device_state_of_garbage(split_rig: VhostUserRig) -> None:
    """Garbage is refused by CHECK_DEVICE_STATE (or the connection ends), never accepted."""
    rig = split_rig
    rig.need_protocol(P.DEVICE_STATE)
    save_state(rig)
    reader, writer = os.pipe()
    try:
        rig.fe.ask(Request.SET_DEVICE_STATE_FD, (1).to_bytes(4, "little") + bytes(4), [reader])
        os.close(reader)
        with open(writer, "wb") as pipe:
            pipe.write(b"\xde\xad" * 5000)
        verdict = rig.fe.get_u64(Request.CHECK_DEVICE_STATE)
    except (Closed, BrokenPipeError):
        return
    require(verdict, "garbage was taken as device state")
