# SPDX-License-Identifier: Apache-2.0
"""The session alone: framing, descriptors, and the rules of replying ("REPLY_ACK")."""

from __future__ import annotations

import os

import pytest
from tests.fakes.descriptors import open_fds

from vballoon.errors import ProtocolError
from vballoon.vhost_user.session import LATER, Fds, Reply, Session, u64
from virtio_formats.vhost_user import (
    MAX_PAYLOAD,
    ProtocolFeature,
    Request,
    VhostUserHeader,
    VhostUserU64,
    VhostVringState,
)

EVERY = ProtocolFeature((1 << 23) - 1)
NEED_REPLY = 8


def message(request, payload=b"", flags=1):
    return VhostUserHeader(request=request, flags=flags, size=len(payload)).build() + payload


def state(index=0, num=0):
    return VhostVringState(index=index, num=num).build()


@pytest.fixture
def fds():
    """Make descriptors to hand over; check at the end that none of them is open."""
    before = open_fds()
    yield lambda count=1: [os.dup(0) for _ in range(count)]
    assert open_fds() == before, "descriptors leaked"


class Handled:
    """A session whose handlers record what reaches them."""

    def __init__(self, offered=EVERY, acked=EVERY):
        self.calls = []
        self.kept = []
        self.trouble = None
        handlers = {request: self.handler(request) for request in Request}
        self.session = Session(handlers, offered)
        self.session.protocol_features = acked

    def handler(self, request):
        def handle(payload, fds):
            self.calls.append((request, payload, len(fds)))
            if self.trouble is not None:
                raise self.trouble
            if request is Request.CHECK_DEVICE_STATE:
                return LATER
            if request is Request.SET_LOG_FD:
                self.kept.append(fds.take())
            if request in (Request.GET_FEATURES, Request.GET_QUEUE_NUM):
                return u64(7)
            return None

        return handle

    def output(self):
        out = self.session.take_output()
        return [(VhostUserHeader.parse(data[:12]), data[12:], sent) for data, sent in out]


VECTORS = {
    "get": [message(Request.GET_FEATURES)],
    "set": [message(Request.SET_FEATURES, bytes(8))],
    "acknowledged": [message(Request.SET_VRING_NUM, state(1, 64), flags=9)],
    "three in a row": [
        message(Request.SET_OWNER),
        message(Request.SET_FEATURES, bytes(range(8)), flags=9),
        message(Request.GET_QUEUE_NUM),
    ],
    "with a table": [message(Request.SET_MEM_TABLE, bytes(8))],
}


@pytest.mark.parametrize("name", VECTORS)
def test_a_stream_means_the_same_in_one_piece_byte_by_byte_and_as_wanted(name):
    results = []
    stream = b"".join(VECTORS[name])
    for pieces in (
        [stream],
        [stream[i : i + 1] for i in range(len(stream))],
        VECTORS[name],
        "as wanted",
    ):
        peer = Handled()
        if pieces == "as wanted":
            at = 0
            while at < len(stream):
                size = peer.session.wanted()
                peer.session.feed(stream[at : at + size])
                at += size
        else:
            for piece in pieces:
                peer.session.feed(piece)
        results.append((peer.calls, [(h.request, h.flags, p) for h, p, _ in peer.output()]))
        assert peer.session.is_open
    assert all(result == results[0] for result in results)
    assert len(results[0][0]) == len(VECTORS[name])


@pytest.mark.parametrize("name", VECTORS)
def test_trailing_junk_ends_the_connection_after_the_good_messages(name):
    peer = Handled()
    peer.session.feed(b"".join(VECTORS[name]) + b"\xff" * 12)
    assert len(peer.calls) == len(VECTORS[name])
    assert not peer.session.is_open
    assert peer.session.error.rule == "message-version"


def test_wanted_never_spans_two_messages():
    peer = Handled()
    assert peer.session.wanted() == 12
    peer.session.feed(message(Request.SET_FEATURES, bytes(8))[:12])
    assert peer.session.wanted() == 8
    peer.session.feed(bytes(5))
    assert peer.session.wanted() == 3
    peer.session.feed(bytes(3))
    assert peer.session.wanted() == 12


@pytest.mark.parametrize("at", [0, 1, 11, 12, 13, 19])
def test_descriptors_belong_to_the_message_wherever_in_it_they_arrive(fds, at):
    data = message(Request.SET_VRING_CALL, bytes(8))
    peer = Handled()
    peer.session.feed(message(Request.SET_OWNER))
    peer.session.feed(data[:at])
    peer.session.feed(data[at:], fds())
    peer.session.feed(message(Request.SET_OWNER))
    assert [(r, n) for r, _, n in peer.calls] == [
        (Request.SET_OWNER, 0),
        (Request.SET_VRING_CALL, 1),
        (Request.SET_OWNER, 0),
    ]


def test_descriptors_split_over_several_reads_are_one_messages(fds):
    data = message(Request.SET_MEM_TABLE, (3).to_bytes(4, "little") + bytes(4 + 96))
    peer = Handled()
    peer.session.feed(data[:4], fds(1))
    peer.session.feed(data[4:20], fds(2))
    peer.session.feed(data[20:])
    assert peer.calls[0][2] == 3


def test_what_a_handler_does_not_take_is_closed_and_what_it_takes_is_not(fds):
    peer = Handled()
    peer.session.feed(message(Request.SET_LOG_FD), fds(1))
    assert len(peer.kept) == 1
    os.fstat(peer.kept[0])
    os.close(peer.kept[0])


REPLY_CASES = {
    "no flag, no reply": (Request.SET_OWNER, 1, EVERY, None, []),
    "flag, acknowledged": (Request.SET_OWNER, 9, EVERY, None, [0]),
    "flag without REPLY_ACK": (Request.SET_OWNER, 9, EVERY & ~ProtocolFeature.REPLY_ACK, None, []),
    "own reply": (Request.GET_FEATURES, 1, EVERY, None, [7]),
    "own reply, not two": (Request.GET_FEATURES, 9, EVERY, None, [7]),
    "refused with flag": (Request.SET_OWNER, 9, EVERY, "x", [1]),
}


@pytest.mark.parametrize("name", REPLY_CASES)
def test_replies(name):
    request, flags, acked, trouble, values = REPLY_CASES[name]
    peer = Handled(acked=acked)
    peer.trouble = trouble and ProtocolError(trouble)
    peer.session.feed(message(request, flags=flags))
    output = peer.output()
    assert [VhostUserU64.parse(p).u64 for _, p, _ in output] == values
    assert all((h.request, h.flags, h.size) == (request, 5, len(p)) for h, p, _ in output)
    assert peer.session.is_open


def test_the_message_that_begins_or_ends_reply_ack_is_itself_acknowledged():
    """Front-ends set the flag on the message that negotiates it; other back-ends answer too."""
    for before, after in ((0, ProtocolFeature.REPLY_ACK), (ProtocolFeature.REPLY_ACK, 0)):
        peer = Handled(acked=ProtocolFeature(before))

        def negotiate(payload, fds, peer=peer, after=after):
            peer.session.protocol_features = ProtocolFeature(after)

        peer.session._handlers = {Request.SET_PROTOCOL_FEATURES: negotiate}
        peer.session.feed(message(Request.SET_PROTOCOL_FEATURES, bytes(8), flags=9))
        assert [VhostUserU64.parse(p).u64 for _, p, _ in peer.output()] == [0]


def test_a_refusal_that_cannot_be_told_ends_the_connection():
    for request, flags in ((Request.SET_OWNER, 1), (Request.GET_FEATURES, 9)):
        peer = Handled()
        peer.trouble = ProtocolError("some-rule", "why")
        peer.session.feed(message(request, flags=flags))
        assert not peer.session.is_open
        assert peer.output() == []
        assert peer.session.error.rule == "some-rule"
        assert peer.session.counters["refused"] == 1


OWN_FAILURES = {
    Request.GET_CONFIG: (bytes(12), b""),
    Request.GET_INFLIGHT_FD: (bytes(24), bytes(24)),
    Request.SET_DEVICE_STATE_FD: (bytes(8), (0x101).to_bytes(8, "little")),
    Request.CHECK_DEVICE_STATE: (b"", (1).to_bytes(8, "little")),
}


@pytest.mark.parametrize("request_", OWN_FAILURES, ids=lambda r: r.name)
def test_failure_in_the_form_of_the_message_itself(request_, fds):
    payload, expected = OWN_FAILURES[request_]
    peer = Handled()
    peer.trouble = ProtocolError("some-rule")
    peer.session.feed(
        message(request_, payload), fds(1) if request_ is Request.SET_DEVICE_STATE_FD else []
    )
    ((header, told, sent),) = peer.output()
    assert (told, sent, header.request) == (expected, [], request_)
    assert peer.session.is_open


FATAL = {
    "message-version": message(1, flags=0),
    "message-version 2": message(1, flags=2),
    "message-flags: a reply": message(1, flags=5),
    "message-flags: unknown": message(1, flags=0x11),
    "message-size": message(1, bytes(MAX_PAYLOAD + 1)),
    "message-size: 4 GiB": VhostUserHeader(request=1, flags=1, size=0xFFFFFFFF).build(),
}


@pytest.mark.parametrize("name", FATAL)
def test_what_is_not_vhost_user_ends_the_connection_unanswered(name, fds):
    peer = Handled()
    peer.session.feed(FATAL[name], fds(2))
    assert not peer.session.is_open
    assert peer.output() == []
    assert peer.session.error.rule == name.split()[0].rstrip(":")
    assert peer.calls == []
    peer.session.feed(message(1), fds(1))  # nothing more is acted upon
    assert peer.calls == []


def test_nine_descriptors_are_too_many(fds):
    peer = Handled()
    peer.session.feed(message(Request.SET_MEM_TABLE, bytes(8)), fds(9))
    assert peer.session.error.rule == "fds-surplus"
    assert peer.calls == []


REFUSED = {
    "request-unknown 0": (0, b"", 0),
    "request-unknown 45": (45, b"", 0),
    "request-unknown huge": (0xFFFFFFFF, b"", 0),
    "fds-surplus: none is due": (Request.SET_OWNER, b"", 1),
    "fds-surplus: one is due": (Request.SET_LOG_FD, b"", 2),
    "fds-missing": (Request.SET_LOG_FD, b"", 0),
    "payload-size: empty": (Request.SET_FEATURES, b"", 0),
    "payload-size: short": (Request.SET_FEATURES, bytes(7), 0),
    "payload-size: long": (Request.SET_FEATURES, bytes(9), 0),
    "payload-size: none is due": (Request.SET_OWNER, bytes(1), 0),
    "payload-size: table count": (Request.SET_MEM_TABLE, b"\xff" * 8, 0),
    "payload-size: half a table": (Request.SET_MEM_TABLE, b"\2" + bytes(7 + 32), 0),
    "payload-size: address": (Request.SET_VRING_ADDR, bytes(39), 0),
    "payload-size: config": (Request.SET_CONFIG, bytes(11), 0),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("flags", [1, 9])
def test_refused_messages_reach_no_handler(name, flags, fds):
    request, payload, count = REFUSED[name]
    peer = Handled()
    peer.session.feed(message(request, payload, flags=flags), fds(count))
    assert peer.calls == []
    if flags == 9:
        assert [VhostUserU64.parse(p).u64 for _, p, _ in peer.output()] == [1]
        assert peer.session.is_open
    else:
        assert not peer.session.is_open
        assert peer.session.error.rule == name.split()[0].rstrip(":")


def test_a_message_whose_feature_was_not_negotiated_is_refused():
    peer = Handled(acked=ProtocolFeature.REPLY_ACK)
    peer.session.feed(message(Request.GET_STATUS, flags=9))
    assert not peer.session.is_open
    assert peer.session.error.rule == "request-not-negotiated"


def test_some_messages_need_their_feature_offered_only():
    peer = Handled(acked=ProtocolFeature(0))
    peer.session.feed(message(Request.GET_QUEUE_NUM) + message(Request.RESET_DEVICE))
    assert [call[0].name for call in peer.calls] == ["GET_QUEUE_NUM", "RESET_DEVICE"]


def test_a_late_answer_holds_back_later_messages():
    peer = Handled()
    peer.session.feed(message(Request.CHECK_DEVICE_STATE) + message(Request.GET_FEATURES))
    assert peer.session.waiting
    assert peer.output() == []
    peer.session.finish(u64(5))
    assert [VhostUserU64.parse(p).u64 for _, p, _ in peer.output()] == [5, 7]


def test_a_peer_that_sends_on_and_on_while_an_answer_is_due_is_let_go():
    peer = Handled()
    peer.session.feed(message(Request.CHECK_DEVICE_STATE))
    for _ in range(400):
        peer.session.feed(message(Request.SET_OWNER))
    assert peer.session.error.rule == "message-early"


def test_a_fault_of_ours_ends_the_connection_and_is_no_traceback(caplog):
    peer = Handled()
    peer.trouble = RuntimeError("a bug")
    peer.session.feed(message(Request.SET_OWNER))
    assert peer.session.error.rule == "internal"
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("sent", [1, 11, 12, 15])
def test_end_of_file_in_the_middle_of_a_message(sent, fds):
    peer = Handled()
    peer.session.feed(message(Request.SET_FEATURES, bytes(8))[:sent], fds())
    peer.session.receive_eof()
    assert peer.session.error.rule == "message-truncated"


def test_end_of_file_between_messages_is_no_error():
    peer = Handled()
    peer.session.feed(message(Request.SET_OWNER))
    peer.session.receive_eof()
    assert peer.session.error is None
    assert not peer.session.is_open


def test_descriptors_of_unsent_replies_are_closed_with_the_session(fds):
    peer = Handled()
    peer.session.feed(message(Request.CHECK_DEVICE_STATE))
    peer.session.finish(Reply(b"", fds(2)))
    peer.session.close()
    peer.session.finish(Reply(b"", fds(1)))


def test_fds_close_what_was_not_taken(fds):
    held = Fds(fds(3))
    first = held.take()
    held.close()
    os.fstat(first)
    os.close(first)
    assert len(held) == 0
