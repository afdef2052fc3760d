# SPDX-License-Identifier: Apache-2.0
"""vballoon.control.session: QMP without a socket."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qemu.qmp.models import ErrorResponse, Greeting

from vballoon.control import session as module
from vballoon.control.session import CommandError, QmpSession, Request


def taken(session):
    lines = b"".join(data for data, _ in session.take_output())
    assert lines == b"" or lines.endswith(b"\r\n")
    return [json.loads(line) for line in lines.splitlines()]


@pytest.fixture
def fresh():
    session = QmpSession((1, 2, 3), "vballoon")
    Greeting(*taken(session))
    return session


@pytest.fixture
def session(fresh):
    assert fresh.feed(b'{"execute": "qmp_capabilities"}') == []
    assert taken(fresh) == [{"return": {}}]
    return fresh


def test_the_greeting_has_the_version():
    (greeting,) = taken(QmpSession((1, 2, 3), "vballoon 1.2.3"))
    assert greeting["QMP"]["version"] == {
        "qemu": {"major": 1, "minor": 2, "micro": 3},
        "package": "vballoon 1.2.3",
    }
    assert greeting["QMP"]["capabilities"] == []


def test_nothing_but_negotiation_before_negotiation(fresh):
    assert fresh.feed(b'{"execute": "query-status", "id": 3}') == []
    (answer,) = taken(fresh)
    assert answer["error"]["class"] == "CommandNotFound"
    assert answer["id"] == 3
    fresh.event("SOMETHING", {})
    assert taken(fresh) == []


def test_negotiation_happens_once_and_enables_nothing(fresh):
    fresh.feed(b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}')
    assert "error" in taken(fresh)[0]
    assert not fresh.negotiated
    fresh.feed(b'{"execute": "qmp_capabilities", "arguments": {"enable": []}, "id": "a"}')
    assert taken(fresh) == [{"return": {}, "id": "a"}]
    fresh.feed(b'{"execute": "qmp_capabilities"}')
    assert taken(fresh)[0]["error"]["class"] == "CommandNotFound"


@pytest.mark.parametrize("ident", [0, None, "x", [1, {"a": None}], {"k": 1.5}, False])
def test_any_id_is_echoed(session, ident):
    (request,) = session.feed(json.dumps({"execute": "quit", "id": ident}).encode())
    session.reply(request, {"a": 1})
    session.fail(request, CommandError("no", "CommandNotFound"))
    assert taken(session) == [
        {"return": {"a": 1}, "id": ident},
        {"error": {"class": "CommandNotFound", "desc": "no"}, "id": ident},
    ]


def test_no_id_no_echo(session):
    (request,) = session.feed(b'{"execute": "quit"}')
    session.reply(request, [])
    assert taken(session) == [{"return": []}]


BAD = [
    (b"hello\n", "not a JSON object"),
    (b"[1, 2]", "not a JSON object"),
    (b"{]}", "not a JSON object"),
    (b'{"execute": }', "not a JSON object"),
    (b'{"execute": "\xff\xfe"}', "not a JSON object"),
    (b"[" * 20_000 + b"]" * 20_000, "not a JSON object"),
    (b'{"a":' * 9_000 + b"1" + b"}" * 9_000, "not a JSON object|unexpected"),
    (b"{}", "lacks member 'execute'"),
    (b'{"execute": 3}', "'execute' must be a string"),
    (b'{"execute": "quit", "arguments": []}', "'arguments' must be an object"),
    (b'{"execute": "quit", "arguments": null}', "'arguments' must be an object"),
    (b'{"execute": "quit", "extra": 1}', "'extra' is unexpected"),
    (b'{"exec-oob": "quit"}', "'exec-oob' is unexpected"),
]


@pytest.mark.parametrize(("data", "says"), BAD, ids=range(len(BAD)))
def test_bad_input_is_answered_and_the_session_goes_on(session, data, says):
    import re

    assert session.feed(data) == []
    (answer,) = taken(session)
    ErrorResponse(answer)
    assert answer["error"]["class"] == "GenericError"
    assert re.search(says, answer["error"]["desc"])
    assert not session.ended
    assert session.feed(b'{"execute": "query-status"}') == [Request("query-status", {})]


@pytest.mark.parametrize(
    "data",
    [
        b'{"execute": "' + b"x" * module.MESSAGE_MAX,
        b"x" * (module.MESSAGE_MAX + 1),
        b'{"execute": "' + b"x" * module.MESSAGE_MAX + b'"}',
    ],
    ids=["endless object", "endless line", "complete but too long"],
)
def test_a_message_without_end_ends_the_session(session, data):
    assert session.feed(data) == []
    (answer,) = taken(session)
    assert "must not exceed" in answer["error"]["desc"]
    assert session.ended
    assert session.feed(b'{"execute": "quit"}') == []
    session.event("X", {})
    assert taken(session) == []


STREAM = (
    b'\xff {"execute": "a", "arguments": {"s": "}{\\"]\\\\"}}{"execute":"b"}\r\n\n'
    b'garbage\n{"execute": "c", "id": "\\u007d"}'
)


def conversation(pieces):
    session = QmpSession((0, 0, 0), "")
    session.feed(b'{"execute": "qmp_capabilities"}')
    taken(session)
    requests = [r for piece in pieces for r in session.feed(piece)]
    return requests, len(taken(session))


@given(st.lists(st.integers(1, 20)))
@settings(max_examples=100, deadline=None)
def test_any_cut_of_the_stream_reads_the_same(cuts):
    pieces, rest = [], STREAM
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    requests, errors = conversation([*pieces, rest])
    assert [(r.name, r.arguments, r.id) for r in requests] == [
        ("a", {"s": '}{"]\\'}, None),
        ("b", {}, None),
        ("c", {}, "}"),
    ]
    assert errors == 1


def test_byte_by_byte():
    assert conversation([bytes([b]) for b in STREAM]) == conversation([STREAM])


@given(st.lists(st.binary(max_size=60), max_size=10))
@settings(max_examples=300, deadline=None)
def test_no_bytes_raise(pieces):
    session = QmpSession((0, 0, 0), "")
    for piece in pieces:
        session.feed(piece)
    for message in taken(session)[1:]:
        ErrorResponse(message)


def test_events_have_a_time_and_data(session):
    session.event("BALLOON_CHANGE", {"actual": 5}, at=1700000000.25)
    session.event("EMPTY", {})
    change, empty = taken(session)
    assert change == {
        "event": "BALLOON_CHANGE",
        "data": {"actual": 5},
        "timestamp": {"seconds": 1700000000, "microseconds": 250000},
    }
    assert "data" not in empty


@pytest.mark.parametrize(
    "number", [b"1e999", b"-1e999", b"NaN", b"Infinity", b'[1, {"a": -1e400}]']
)
@pytest.mark.parametrize("command", [b"qmp_capabilities", b"query-status"])
def test_answers_are_json_whatever_number_the_client_sends(session, command, number):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    session.feed(b'{"execute": "%s", "id": %s}' % (command, number))
    for data, _ in session.take_output():
        assert "error" in json.loads(data, parse_constant=refuse)
