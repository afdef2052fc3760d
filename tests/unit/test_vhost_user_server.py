# SPDX-License-Identifier: Apache-2.0
"""Listening, connecting, an inherited descriptor; front-ends that come and go; the status."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest
from tests.fakes.backends import Recorder, backend_thread
from tests.fakes.descriptors import open_fds
from tests.fakes.echo_device import EchoDevice
from tests.fakes.frontend import Frontend, R

import vballoon.vhost_user
from vballoon.errors import UsageError
from vballoon.vhost_user import VhostUserServer
from vballoon.vhost_user.channel import MAX_OUTSTANDING, BackendChannel
from vballoon.virtio import feature_names
from virtio_formats.vhost_user import BackendRequest, VhostUserHeader, VhostUserU64


def eventually(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)


def test_front_ends_are_served_one_after_the_other(tmp_path):
    device, events = EchoDevice(), Recorder()
    with backend_thread(device, path=tmp_path / "s", events=events) as backend:
        for _ in range(3):
            with Frontend.connect(tmp_path / "s") as frontend:
                (ring,) = frontend.up()
                ident = ring.submit(b"hello", 8)
                ring.kick()
                assert ring.collect(1) == [(ident, 5)]
        eventually(lambda: len(events.told) == 6)
        status = backend.status()
        assert not status.connected
        assert status.counters["SET_OWNER"] == 3
    assert events.told == [("connected",), ("disconnected", "")] * 3
    assert device.log.count("attach") == device.log.count("detach") == 3
    assert not (tmp_path / "s").exists(), "the socket still exists"


def test_a_second_front_end_waits_for_the_first_to_go(tmp_path):
    with backend_thread(EchoDevice(), path=tmp_path / "s"):
        first = Frontend.connect(tmp_path / "s")
        assert first.get_u64(R.GET_FEATURES)
        second = Frontend.connect(tmp_path / "s")
        second.send(R.GET_FEATURES)
        second.sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            second.sock.recv(1)
        first.close()
        second.sock.settimeout(5)
        assert second.receive(R.GET_FEATURES)
        second.close()


def test_client_connects_when_the_front_end_appears_and_again_when_it_comes_back(tmp_path):
    path = tmp_path / "frontend"
    with backend_thread(EchoDevice(), path=path, client=True):
        time.sleep(0.1)  # nobody is there yet
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(10)
        for _ in range(2):
            sock, _ = listener.accept()
            with Frontend(sock) as frontend:
                assert frontend.get_u64(R.GET_FEATURES)
        listener.close()
    assert path.exists(), "the front-end's socket is not ours to remove"


def test_an_inherited_connection_is_served_and_then_it_is_over(tmp_path):
    ours, theirs = socket.socketpair()
    with backend_thread(EchoDevice(), fd=theirs.detach()) as backend:
        with Frontend(ours) as frontend:
            (ring,) = frontend.up()
            ring.submit(b"x", 8)
            ring.kick()
            ring.collect(1)
        eventually(lambda: backend.loop.is_closed() or not backend.loop.is_running())


def test_an_inherited_listening_socket_is_served_for_ever(tmp_path):
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "s"))
    listener.listen(1)
    with backend_thread(EchoDevice(), fd=listener.detach()):
        for _ in range(2):
            with Frontend.connect(tmp_path / "s") as frontend:
                assert frontend.get_u64(R.GET_FEATURES)
    assert (tmp_path / "s").exists(), "whoever made the socket removes it"


def test_the_servers_end_lets_the_front_end_go(tmp_path):
    device = EchoDevice()
    with backend_thread(device, path=tmp_path / "s"):
        frontend = Frontend.connect(tmp_path / "s")
        frontend.up()
    frontend.expect_close()
    frontend.close()
    assert device.log[-2:] == ["stop", "detach"]


USAGE = {
    "both a path and a descriptor": {"path": "x", "fd": 3},
    "neither": {},
    "client without a path": {"fd": 3, "client": True},
}


@pytest.mark.parametrize("name", USAGE)
def test_options_that_do_not_go_together(name):
    with pytest.raises(UsageError):
        VhostUserServer(EchoDevice(), **USAGE[name])


def test_a_path_in_use_is_one_clear_line(tmp_path):
    with backend_thread(EchoDevice(), path=tmp_path / "s"):
        with pytest.raises(UsageError, match="another server listens"):
            VhostUserServer(EchoDevice(), path=tmp_path / "s").open()
        with Frontend.connect(tmp_path / "s") as frontend:
            assert frontend.get_u64(R.GET_FEATURES)
    with pytest.raises(UsageError, match="No such file"):
        VhostUserServer(EchoDevice(), path=tmp_path / "no" / "s").open()
    reader, writer = os.pipe()
    with pytest.raises(UsageError, match="not a socket"):
        VhostUserServer(EchoDevice(), fd=reader).open()
    os.close(reader)
    os.close(writer)


def test_a_dead_servers_path_is_taken_over(tmp_path):
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(tmp_path / "s"))
    dead.close()
    with (
        backend_thread(EchoDevice(), path=tmp_path / "s"),
        Frontend.connect(tmp_path / "s") as frontend,
    ):
        assert frontend.get_u64(R.GET_FEATURES)


def test_status_tells_regions_queues_features_and_counters(tmp_path):
    names = {0: "ECHO_F_ECHO"}
    with (
        backend_thread(EchoDevice(), path=tmp_path / "s", device_names=names) as backend,
        Frontend.connect(tmp_path / "s") as frontend,
    ):
        ring, _ = frontend.up(0, 2)
        ring.submit(b"x", 8)
        ring.kick()
        ring.collect(1)
        status = backend.status()
    assert (status.transport, status.connected) == ("vhost-user", True)
    assert status.features == [
        "ECHO_F_ECHO",
        "bit 1",
        "VIRTIO_F_INDIRECT_DESC",
        "VIRTIO_F_EVENT_IDX",
        "VIRTIO_F_VERSION_1",
    ]
    assert [q.state for q in status.queues] == ["running", "stopped", "running"]
    queue = status.queues[0]
    assert (queue.size, queue.taken, queue.given, queue.outstanding) == (16, 1, 1, 0)
    assert [(r.guest_phys_addr, r.size) for r in status.regions] == [(0, 16 << 20)]
    assert status.counters["SET_VRING_KICK"] == 2


def test_nothing_is_left_of_fifty_front_ends(tmp_path):
    with backend_thread(EchoDevice(), path=tmp_path / "s") as backend:
        counts = []
        for _ in range(50):
            with Frontend.connect(tmp_path / "s") as frontend:
                frontend.up(0, 1)
                frontend.open_channel()
            eventually(lambda: not backend.status().connected)
            counts.append(open_fds())
    assert counts[-1] <= counts[5]


def test_an_idle_backend_uses_no_cpu(tmp_path):
    with (
        backend_thread(EchoDevice(), path=tmp_path / "s"),
        Frontend.connect(tmp_path / "s") as frontend,
    ):
        frontend.up(0, 1)
        time.sleep(0.2)
        before = time.process_time()
        time.sleep(1)
        assert time.process_time() - before < 0.05


def test_feature_names_name_unknown_bits_by_number():
    assert feature_names(1 << 32 | 1 << 50 | 2, {1: "ONE"}) == [
        "ONE",
        "VIRTIO_F_VERSION_1",
        "bit 50",
    ]


def test_the_capabilities_file_is_what_the_schema_wants():
    """`VhostUserBackend` of QEMU's docs/interop/vhost-user.json."""
    folder = Path(vballoon.vhost_user.__file__).parent
    shipped = json.loads((folder / "50-vballoon.json").read_text())
    assert shipped["type"] == "balloon"
    assert set(shipped) <= {"description", "type", "binary", "tags"}
    assert shipped["binary"].startswith("/")


# -- the back-end channel alone


def answer(request, value=0, flags=5, size=8):
    head = VhostUserHeader(request=request, flags=flags, size=size).build()
    return head + VhostUserU64(u64=value).build()


def test_channel_asks_for_answers_only_if_told_to():
    quiet, asking = BackendChannel(), BackendChannel(need_reply=True)
    for channel, flags in ((quiet, 1), (asking, 9)):
        channel.config_changed()
        ((data, fds),) = channel.take_output()
        header = VhostUserHeader.parse(data)
        assert (header.request, header.flags, header.size, fds) == (2, flags, 0, [])


def test_channel_holds_back_changes_while_too_many_answers_are_due():
    channel = BackendChannel(need_reply=True)
    for _ in range(MAX_OUTSTANDING + 10):
        channel.config_changed()
    assert len(channel.take_output()) == MAX_OUTSTANDING
    for i in range(len(stream := answer(2))):
        channel.feed(stream[i : i + 1])
    assert len(channel.take_output()) == 1, "the latest news, once"
    assert (channel.answered, channel.failed) == (1, 0)


def test_channel_counts_failures():
    channel = BackendChannel(need_reply=True)
    channel.config_changed()
    channel.feed(answer(2, value=22))
    assert channel.failed == 1


@pytest.mark.parametrize(
    "bad", [answer(3), answer(2, flags=1), answer(2, size=9), answer(2) + answer(2)]
)
def test_channel_refuses_what_is_no_answer(bad):
    from vballoon.errors import ProtocolError

    channel = BackendChannel(need_reply=True)
    channel.config_changed()
    with pytest.raises(ProtocolError, match="backend-reply"):
        channel.feed(bad)


def test_channel_sends_descriptors_and_takes_none():
    channel = BackendChannel()
    channel.request(BackendRequest.SHARED_OBJECT_ADD, bytes(16), [7])
    assert channel.take_output()[0][1] == [7]
    before = open_fds()
    channel.feed(b"", [os.dup(0)])
    assert open_fds() == before
