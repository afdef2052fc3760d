# SPDX-License-Identifier: Apache-2.0
"""vballoon.control over a real socket: QEMU's own client code, and clients that misbehave."""

from __future__ import annotations

import asyncio
import base64
import json
import mmap
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient
from tests.unit.control_fakes import FakeBalloon, served
from tests.unit.test_skipmap_map import put

import fdsocket
from vballoon.control import ControlClient
from vballoon.errors import UsageError
from vballoon.skipmap import FrozenExport, Provenance, SkipExport

B, R, H, W = Provenance
MIB = 1 << 20


@pytest.fixture
def balloon():
    return FakeBalloon()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "control.sock"


@pytest.fixture
def server(path, balloon):
    with served(path, balloon) as (server, call):
        server.call = call
        yield server


@pytest.fixture
def client(server, path):
    with ControlClient(path, timeout=10) as client:
        yield client


# QEMU's code at the other end


def test_qemu_s_client_library(server, path, balloon):
    async def talk():
        qmp = QMPClient("test")
        await qmp.connect(str(path))
        try:
            assert qmp.greeting.QMP.version["package"].startswith("vballoon")
            assert (await qmp.execute("query-balloon"))["actual"] == 6 * MIB
            listener = EventListener()
            with qmp.listen(listener):
                assert await qmp.execute("balloon", {"value": 5 * MIB}) == {}
                event = await asyncio.wait_for(listener.get(), 10)
            assert event["event"] == "BALLOON_CHANGE"
            assert event["data"] == {"actual": 5 * MIB}
            with pytest.raises(ExecuteError) as raised:
                await qmp.execute("no-such-command")
            assert raised.value.error.error.class_ == "CommandNotFound"
        finally:
            await qmp.disconnect()

    asyncio.run(talk())


def test_qmp_shell_as_a_program(server, path):
    script = "query-balloon\nballoon value=4194304\nquery-balloon\nnonsense\n"
    done = subprocess.run(
        [Path(sys.executable).parent / "qmp-shell", path],
        input=script,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TERM": "dumb"},
    )
    assert done.returncode == 0, done.stderr
    assert '{"return": {"actual": 6291456, "target": 6291456, "floor": 2097152' in done.stdout
    assert '{"return": {"actual": 4194304, "target": 4194304, "floor": 2097152' in done.stdout
    assert "CommandNotFound" in done.stdout


# commands


def test_every_command_is_listed_with_help(client):
    listed = client.execute("query-commands")
    assert {c["name"] for c in listed} == {
        "qmp_capabilities", "balloon", "query-balloon", "query-guest-stats",
        "set-guest-stats-interval", "start-hinting", "stop-hinting", "start-walk", "stop-walk",
        "query-round", "query-skip-bitmap", "get-skip-export-fd", "get-skip-bitmap-fd",
        "query-memory-map", "query-status", "query-commands", "quit",
        "query-guest-memory", "get-guest-memory-fd", "get-memmap-layout",
    }  # fmt: skip
    assert all(len(c["help"]) > 10 for c in listed)
    assert all(a["help"] for c in listed for a in c["arguments"])


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("balloon", {}, "'value' is missing"),
        ("balloon", {"value": "5"}, "'value', expected: integer"),
        ("balloon", {"value": 5.0}, "'value', expected: integer"),
        ("balloon", {"value": True}, "'value', expected: integer"),
        ("balloon", {"value": 0}, "'value' expects a value from 1"),
        ("balloon", {"value": 1 << 63}, "'value' expects a value from 1"),
        ("balloon", {"value": 1, "x": 1}, "'x' is unexpected"),
        ("set-guest-stats-interval", {"seconds": -1}, "'seconds' expects"),
        ("start-hinting", {"hold": 1}, "'hold', expected: boolean"),
        ("start-walk", {"min-order": 64}, "'min-order' expects"),
        ("query-round", {"kind": "x"}, "one of hint, walk"),
        ("query-round", {}, "no round yet"),
        ("query-round", {"kind": "walk"}, "no walk round yet"),
        ("query-memory-map", {"cells": 0}, "'cells' expects"),
        ("query-memory-map", {"cells": 1 << 20}, "'cells' expects"),
    ],
)
def test_wrong_arguments_get_one_sentence(client, command, arguments, says):
    with pytest.raises(UsageError, match=says) as raised:
        client.execute(command, arguments)
    assert "\n" not in str(raised.value)
    shown = client.execute("query-balloon")
    assert (shown["actual"], shown["driver-running"]) == (6 * MIB, True)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("balloon", {"value": 4096}),
        ("query-balloon", {}),
        ("query-skip-bitmap", {}),
        ("get-skip-bitmap-fd", {}),
        ("query-memory-map", {"cells": 10}),
        ("get-skip-export-fd", {}),
    ],
)
def test_before_a_guest_is_there(path, command, arguments):
    with (
        served(path, FakeBalloon(memory=False)),
        ControlClient(path) as client,
        pytest.raises(UsageError, match="no guest memory yet"),
    ):
        client.execute(command, arguments)


def test_statistics_and_their_interval(client, server, balloon):
    assert client.execute("query-guest-stats") == {
        "stats": {},
        "last-update": 0,
        "driver-running": True,
    }
    client.execute("set-guest-stats-interval", {"seconds": 1000})
    assert balloon.requested == 1
    assert client.execute("query-guest-stats") == {
        "stats": {"stat-free-memory": 1 << 40},
        "last-update": 1700000000,
        "driver-running": True,
    }
    server.operator.stats_interval = 0.02  # the timer, without waiting for seconds
    server.call(server.operator.interval_changed)
    deadline = time.monotonic() + 10
    while balloon.requested < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert balloon.requested >= 5
    client.execute("set-guest-stats-interval", {"seconds": 0})
    before = balloon.requested
    time.sleep(0.1)
    assert balloon.requested == before


def test_rounds(client, server, balloon):
    started = client.execute("start-hinting", {"hold": True})
    assert balloon.calls == [("start_hinting", True)]
    shown = client.execute("query-round")
    assert shown["round"] == started["round"]
    assert (shown["kind"], shown["state"], shown["complete"]) == ("hint", "running", False)
    walk = client.execute("start-walk", {"min-order": 3})["round"]
    assert balloon.calls[-1] == ("start_walk", 3)
    assert client.execute("query-round")["round"] == walk
    assert client.execute("query-round", {"kind": "hint"})["round"] == started["round"]
    client.execute("stop-hinting")
    shown = client.execute("query-round", {"kind": "hint"})
    assert (shown["state"], shown["void-reason"]) == ("void", "stopped by the operator")
    assert client.execute("stop-walk") == {}
    assert balloon.calls[-1] == ("stop_walk",)


def test_query_skip_bitmap(client, balloon):
    put(balloon.skipmap, B, (0, 10))
    put(balloon.skipmap, R, (20, 30))
    balloon.memory.regions[0].view[20 * 4096] = 1
    shown = client.execute("query-skip-bitmap")
    assert shown["pages"] == {"ballooned": 10, "reported": 9, "hinted": 0, "walked": 0}
    assert shown["reported-ever"] == 10
    assert shown["guest-size"] == 6 * MIB
    assert shown["regions"][1] == {
        "guest-phys-addr": 1 << 32,
        "size": 2 * MIB,
        "file-offset": 4 * MIB,
    }


def test_export(client, balloon, tmp_path):
    put(balloon.skipmap, B, (0, 10))
    pages = client.export(tmp_path / "out")
    assert pages == {"ballooned": 10, "reported": 0, "hinted": 0, "walked": 0}
    assert SkipExport(tmp_path / "out").bitmap(B).count() == 10
    with pytest.raises(UsageError, match="cannot export to"):
        client.export("/proc/nothing/here")


def test_the_received_export_is_the_written_one(client, balloon, tmp_path):
    put(balloon.skipmap, B, (0, 10))
    put(balloon.skipmap, W, (64, 66))
    client.export(tmp_path / "received")
    FrozenExport(balloon.skipmap).write(tmp_path / "written")
    for path in sorted((tmp_path / "written").glob("*.bitmap")):
        assert path.read_bytes() == (tmp_path / "received" / path.name).read_bytes()
    assert SkipExport(tmp_path / "received").verify() == SkipExport(tmp_path / "written").verify()


def test_the_export_and_the_live_bitmaps_cannot_be_written(client):
    for command in ("get-skip-export-fd", "get-skip-bitmap-fd"):
        _, fd = client.execute_fd(command)
        os.fchmod(fd, 0o600)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        with pytest.raises(PermissionError):
            mmap.mmap(again, 4096, prot=mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.write(again, b"x")
        os.close(again)
        os.close(fd)


def test_bits_change_and_go_after_the_live_descriptor_was_handed_out(client, balloon):
    layout, fd = client.execute_fd("get-skip-bitmap-fd")
    put(balloon.skipmap, W, (64, 66))
    with mmap.mmap(fd, layout["size"], prot=mmap.PROT_READ) as view:
        assert any(view[4096:])
        balloon.skipmap.close()
        assert not any(view[4096:])
    os.close(fd)


def test_the_descriptor_comes_with_the_reply(client, balloon):
    put(balloon.skipmap, W, (64, 66))
    layout, fd = client.execute_fd("get-skip-bitmap-fd")
    (entry,) = [
        b for b in layout["bitmaps"] if b["provenance"] == "walked" and b["guest-phys-addr"] == 0
    ]
    with mmap.mmap(fd, layout["size"], prot=mmap.PROT_READ) as view:
        assert view[entry["offset"] + 8] == 3
        put(balloon.skipmap, W, (66, 67))
        assert view[entry["offset"] + 8] == 7, "it is live"
    os.close(fd)


def test_memory_map(client, balloon):
    put(balloon.skipmap, B, (0, 128))
    put(balloon.skipmap, H, (128, 129))
    balloon.memory.regions[1].view[: 64 * 4096] = 1
    shown = client.execute("query-memory-map", {"cells": 12})
    assert shown["cell-pages"] == 128
    low, high = shown["regions"]
    assert list(base64.b64decode(low["fill"]["ballooned"])) == [255] + [0] * 7
    assert list(base64.b64decode(low["fill"]["hinted"])) == [0, 2] + [0] * 6
    assert list(base64.b64decode(high["fill"]["resident"])) == [128, 0, 0, 0]
    assert shown["pages"]["resident"] == 64


def test_query_status_names_what_is_there(client):
    status = client.execute("query-status")
    assert status["pid"] == os.getpid()
    assert status["transport"] == "vhost-user"
    assert status["connected"] is True
    assert status["features"] == ["VIRTIO_BALLOON_F_STATS_VQ"]
    assert status["queues"][0]["taken"] == 5
    assert status["transport-counters"] == {"GET_FEATURES": 1}
    assert status["counters"]["inflated-pages"] == 3


def test_quit_answers_first(path):
    with served(path), ControlClient(path) as client:
        assert client.execute("quit") == {}
        with pytest.raises(UsageError, match=r"closed the connection|reset by|Broken"):
            client.execute("query-status")
    assert not path.exists()


def test_a_fault_of_ours_is_logged_and_told_without_details(client, balloon, caplog):
    balloon.stop_walk = lambda: 1 // 0
    with pytest.raises(UsageError, match="internal error"):
        client.execute("stop-walk")
    assert "ZeroDivisionError" in caplog.text
    assert client.execute("query-balloon")


# several clients, and bad ones


def raw(path):
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(str(path))
    return connection


def read_all(connection):
    data = b""
    while piece := connection.recv(1 << 16):
        data += piece
    return [json.loads(line) for line in data.splitlines()]


def test_clients_do_not_share_anything_but_events(server, path, balloon):
    with ControlClient(path) as one, ControlClient(path) as two:
        one.execute("balloon", {"value": 4 * MIB})
        for client in (one, two):
            event = client.wait_event("BALLOON_CHANGE", 10)
            assert event["data"] == {"actual": 4 * MIB}
        assert two.execute("query-balloon")["actual"] == 4 * MIB


def test_pipelined_commands_are_answered_in_order(server, path):
    with raw(path) as connection:
        connection.sendall(b'{"execute":"qmp_capabilities"}')
        for i in range(500):
            connection.sendall(json.dumps({"execute": "query-balloon", "id": i}).encode())
        data = b""
        while data.count(b"\n") < 502:
            data += connection.recv(1 << 16)
    answers = [json.loads(line) for line in data.splitlines()]
    assert [a["id"] for a in answers[2:]] == list(range(500))


def test_an_endless_message_ends_the_conversation_only(server, path):
    with raw(path) as connection, ControlClient(path) as other:
        connection.sendall(b'{"execute": "' + b"x" * 70_000)
        answers = read_all(connection)
        assert "must not exceed" in answers[-1]["error"]["desc"]
        assert other.execute("query-balloon")


def test_a_client_that_never_reads_is_disconnected_and_holds_nobody_up(server, path, balloon):
    deaf, mute = raw(path), raw(path)
    deaf.sendall(b'{"execute":"qmp_capabilities"}')
    with ControlClient(path) as client:
        client.execute("query-balloon")
        before = len(server.clients)
        began = time.monotonic()
        for _ in range(400):
            server.call(server.event, "FRONTEND_CONNECTED", {"filler": "x" * 10_000})
            client.execute("query-balloon")
            client.events.clear()
        took = time.monotonic() - began
        server.call(lambda: None)
        assert len(server.clients) == before - 1
        assert took < 20
        assert client.execute("query-balloon")
    deaf.close()
    mute.close()


def test_a_guest_cannot_flood_the_clients(server, path, balloon):
    with ControlClient(path) as client:
        for actual in range(1, 2000):
            server.call(balloon.events, "BALLOON_CHANGE", {"actual": actual})
        told = [client.wait_event("BALLOON_CHANGE", 10)]
        while told[-1]["data"]["actual"] != 1999:
            told.append(client.wait_event("BALLOON_CHANGE", 10))
        assert told[0]["data"] == {"actual": 1}
        seconds = [event["timestamp"]["seconds"] for event in told]
        assert len(told) <= seconds[-1] - seconds[0] + 3, "one a second, and the last one"


def test_clients_that_come_and_go_leave_nothing(server, path):
    before = set(os.listdir("/proc/self/fd"))
    for i in range(20):
        connection = raw(path)
        if i % 2:
            connection.sendall(b'{"execute":"qmp_capabilities"}{"execute":"get-skip-bitmap-fd"}')
        connection.close()
    deadline = time.monotonic() + 10
    # Something of before may go meanwhile, and with it the number that the listing itself has.
    while not set(os.listdir("/proc/self/fd")) <= before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(os.listdir("/proc/self/fd")) <= before


def test_the_socket_is_the_owner_s_alone_and_a_dead_one_is_replaced(path):
    with served(path):
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(UsageError, match="another server"), served(path):
            pass
    assert not path.exists()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with served(path), ControlClient(path) as client:
        assert client.execute("query-balloon")


def test_a_client_that_finds_no_server_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match="is 'vballoon serve --control' running"):
        ControlClient(tmp_path / "none")
    with fdsocket.listen(tmp_path / "device") as silent:
        with pytest.raises(UsageError, match="is it the socket that"):
            ControlClient(tmp_path / "device", timeout=0.05)
        silent.close()


OTHER_USER = """
import json, os, socket, sys
os.fchdir(int(sys.argv[1]))
os.setresuid(65534, 65534, 65534)
sock = socket.socket(socket.AF_UNIX)
sock.connect("control.sock")
file = sock.makefile("rw")
file.readline()
for command in ("qmp_capabilities", "get-guest-memory-fd", "query-balloon"):
    arguments = {"arguments": {"file": 0}} if "fd" in command else {}
    file.write(json.dumps({"execute": command} | arguments) + "\\n")
    file.flush()
    print(file.readline(), end="")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_gets_no_descriptor_of_guest_memory(client, tmp_path):
    (socket_path,) = [p for p in tmp_path.rglob("*") if p.is_socket()]
    socket_path.chmod(0o777)
    socket_path.parent.chmod(0o755)
    folder = os.open(socket_path.parent, os.O_RDONLY)
    done = subprocess.run(
        [sys.executable, "-c", OTHER_USER, str(folder)],
        pass_fds=[folder],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    os.close(folder)
    assert done.returncode == 0, done.stderr
    _, refused, answered = map(json.loads, done.stdout.splitlines())
    assert "serves only root and the user that runs the server" in refused["error"]["desc"]
    assert "return" in answered
