# SPDX-License-Identifier: Apache-2.0
"""``vballoon serve`` as a process: sockets, signals, time to start, several machines."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from tests.fakes.frontend import Frontend
from tests.fakes.memory import make_memory

from vballoon.cli import vhost_user_main
from vballoon.control import ControlClient
from vballoon.errors import UsageError
from vballoon.keeper.config import read_config
from vballoon.keeper.features import parse_features
from vballoon.keeper.logs import _OneLine
from virtio_formats.virtio.balloon import BalloonFeature as F

EVENT_SECONDS = 60
"""Upper limit of each wait for an event: a worker starts slowly on a busy machine."""


class Served:
    """A ``vballoon serve`` process."""

    def __init__(self, *words, pass_fds=()):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vballoon", "serve", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=pass_fds,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stderr.close()

    def end(self, number=signal.SIGTERM):
        """Signal it (None: wait only); its exit code and what it logged."""
        if number is not None:
            self.process.send_signal(number)
        _, said = self.process.communicate(timeout=EVENT_SECONDS)
        return self.process.returncode, said


def connected(path, timeout=EVENT_SECONDS):
    deadline = time.monotonic() + timeout
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(path))
            return sock
        except OSError:
            sock.close()
            assert time.monotonic() < deadline, f"nobody listens at {path}"
            time.sleep(0.002)


def control(path):
    """Connect once the worker greets: the keeper listens before it has one."""
    deadline = time.monotonic() + EVENT_SECONDS
    while True:
        connected(path).close()
        try:
            return ControlClient(path)
        except UsageError:
            assert time.monotonic() < deadline, f"no greeting at {path}"


@pytest.mark.parametrize("kind", ["vhost-user", "vfio-user"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_the_sockets_go(tmp_path, kind, number):
    device, operator = tmp_path / "b", tmp_path / "c"
    with Served(f"--{kind}", device, "--control", operator) as served:
        with control(operator) as client:
            assert client.execute("query-status")["transport"] == kind
        code, said = served.end(number)
        assert code == 0
        assert "Traceback" not in said
        assert os.listdir(tmp_path) == []


def test_quit_ends_it(tmp_path):
    with Served("--vhost-user", tmp_path / "b", "--control", tmp_path / "c") as served:
        with control(tmp_path / "c") as client:
            client.execute("quit")
        assert served.end(None)[0] == 0
    assert os.listdir(tmp_path) == []


LISTENING_MODULES = """
import os, sys
def hook(event, args):
    if event == "socket.bind":
        print(*sys.modules, flush=True)
        os._exit(0)
sys.addaudithook(hook)
from vballoon.cli import main
main(sys.argv[1:])
"""
MODULES_MAX = 240
"""Modules of CPython 3.11 and later (75), of asyncio with ssl (75), and of ours and their own."""


def test_it_listens_soon(tmp_path):
    """Only what parses the words and opens the sockets is loaded before the server listens."""
    words = [sys.executable, "-c", LISTENING_MODULES, "serve", "--vhost-user", tmp_path / "b"]
    loaded = subprocess.check_output(words, text=True).split()
    assert "vballoon.keeper.listening" in loaded
    late = ("numpy", "vballoon.balloon", "vballoon.keeper.supervisor", "qemu", "email")
    assert [name for name in loaded if name.startswith(late)] == []
    assert len(loaded) <= MODULES_MAX, loaded


def test_it_is_small(tmp_path):
    """Under 80 MiB with a guest of 4 GiB attached: the bitmaps take what is set, no more."""
    with (
        Served("--vhost-user", tmp_path / "b", "--control", tmp_path / "c") as served,
        control(tmp_path / "c") as client,
        Frontend.connect(tmp_path / "b", make_memory((0, 4 << 30))) as frontend,
    ):
        frontend.negotiate()
        frontend.share_memory()
        frontend.get_u64(1)
        assert client.execute("query-status")["guest-size"] == 4 << 30
        client.execute("query-memory-map", {"cells": 1 << 16})
        with open(f"/proc/{served.process.pid}/status") as status:
            kib = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        assert kib < 80 * 1024


def test_events_of_front_ends_reach_the_operator(tmp_path):
    with (
        Served("--vhost-user", tmp_path / "b", "--control", tmp_path / "c"),
        control(tmp_path / "c") as client,
    ):
        connected(tmp_path / "b").close()
        client.wait_event("FRONTEND_CONNECTED", EVENT_SECONDS)
        client.wait_event("FRONTEND_DISCONNECTED", EVENT_SECONDS)


def test_an_inherited_connection_ends_the_server_when_it_ends(tmp_path):
    ours, theirs = socket.socketpair()
    with Served("--fd", theirs.fileno(), pass_fds=[theirs.fileno()]) as served:
        theirs.close()
        ours.close()
        assert served.end(None)[0] == 0


def test_an_inherited_listener_serves_one_after_the_other(tmp_path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "b"))
    listener.listen()
    number = listener.fileno()
    with Served("--fd", number, "--control", tmp_path / "c", pass_fds=[number]) as served:
        listener.close()
        with control(tmp_path / "c") as client:
            for _ in range(2):
                connected(tmp_path / "b").close()
                client.wait_event("FRONTEND_DISCONNECTED", EVENT_SECONDS)
        assert served.end()[0] == 0


def test_a_bad_descriptor_is_one_line(tmp_path):
    with Served("--fd", "77") as served:
        code, said = served.end(None)
    assert code == 1
    assert said == "vballoon: descriptor 77 is not a socket\n"


def test_a_client_connects_when_somebody_listens(tmp_path):
    with Served("--vhost-user", tmp_path / "b", "--client", "--control", tmp_path / "c") as served:
        with control(tmp_path / "c") as client:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(tmp_path / "b"))
            listener.listen()
            listener.settimeout(EVENT_SECONDS)
            connection, _ = listener.accept()
            client.wait_event("FRONTEND_CONNECTED", EVENT_SECONDS)
            connection.close()
            listener.close()
        assert served.end()[0] == 0


def test_a_socket_in_use_is_one_line(tmp_path):
    with Served("--vhost-user", tmp_path / "b") as first:
        connected(tmp_path / "b").close()
        with Served("--vhost-user", tmp_path / "b") as second:
            code, said = second.end(None)
        assert code == 1
        assert said == f"vballoon: {tmp_path}/b: another server listens on it\n"
        connected(tmp_path / "b").close()
        assert first.end()[0] == 0


def test_two_machines_in_one_process(tmp_path):
    config = tmp_path / "vms.toml"
    config.write_text(
        "".join(
            f'[[vm]]\n{kind} = "{tmp_path}/{name}"\ncontrol = "{tmp_path}/{name}-c"\n'
            for name, kind in (("one", "vhost-user"), ("two", "vfio-user"))
        )
    )
    with Served("--config", config) as served:
        with control(tmp_path / "one-c") as one, control(tmp_path / "two-c") as two:
            assert one.execute("query-status")["transport"] == "vhost-user"
            assert two.execute("query-status")["transport"] == "vfio-user"
        assert served.end()[0] == 0
    assert os.listdir(tmp_path) == ["vms.toml"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "tables are expected"),
        ("x = 1", "tables are expected"),
        ("[vm]\n", "tables are expected"),
        ("[[vm]]\n", "exactly one of"),
        ('[[vm]]\nvhost-user = "a"\nvfio-user = "b"', "exactly one of"),
        ('[[vm]]\nvhost-user = "a"\nspeed = 9', "unknown key 'speed'"),
        ("[[vm]]\nvhost-user = 3", "must be of type str"),
        ("[[vm]]\nfd = true", "must be of type int"),
        ("[[vm", "vms.toml"),
        ("\xff", "vms.toml"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, says):
    path = tmp_path / "vms.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=says):
        read_config(path)


def test_what_management_software_asks(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vballoon-vhost-user", "--print-capabilities"])
    assert vhost_user_main() == 0
    assert json.loads(capsys.readouterr().out) == {"type": "balloon"}


# features by name

ALL = parse_features("")


def test_names_without_a_sign_replace_the_balloon_s_features():
    assert parse_features("STATS_VQ,page-reporting").device == F.STATS_VQ | F.PAGE_REPORTING
    assert parse_features("STATS_VQ").ring == ALL.ring


def test_signs_change_the_default():
    assert parse_features("-FREE_PAGE_WALK").device == ALL.device & ~F.FREE_PAGE_WALK
    packed = parse_features("+VIRTIO_F_RING_PACKED,-event-idx")
    assert packed.device == ALL.device
    assert packed.ring == ALL.ring & ~(1 << 29) | 1 << 34
    assert packed.pci_ring == ALL.pci_ring & ~(1 << 29) | 1 << 34


@pytest.mark.parametrize("text", ["-PAGE_POISON", "FREE_PAGE_WALK", "STATS_VQ,free-page-walk"])
def test_the_walk_is_not_offered_without_page_poison(text):
    with pytest.raises(UsageError, match="FREE_PAGE_WALK needs PAGE_POISON"):
        parse_features(text)
    assert not parse_features(f"{text},-FREE_PAGE_WALK").device & F.FREE_PAGE_WALK
    both = f"{text},+PAGE_POISON"
    assert parse_features(both).device & F.FREE_PAGE_WALK


@pytest.mark.parametrize("text", ["FASTER", "+", "-", "VIRTIO_BALLOON_F_"])
def test_an_unknown_feature_is_named(text):
    with pytest.raises(UsageError, match="unknown feature"):
        parse_features(text)


def test_a_log_record_is_one_line():
    import logging

    record = logging.LogRecord("room", 20, "", 0, "from a peer: %s", ("a\nb\rc",), None)
    assert _OneLine("%(message)s").format(record) == "from a peer: a | b\\rc"
