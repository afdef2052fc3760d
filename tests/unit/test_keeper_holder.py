# SPDX-License-Identifier: Apache-2.0
"""A front-end that waits while another one holds the device."""

from __future__ import annotations

import os
import socket

import pytest
from tests.unit.test_cli_serve import Served, connected

from vballoon.control import ControlClient
from virtio_formats.vhost_user import Request, VhostUserHeader

pytestmark = pytest.mark.timeout(60)

GET_FEATURES = VhostUserHeader(request=Request.GET_FEATURES, flags=1, size=0).build()


def ask(sock: socket.socket) -> bytes:
    """Send GET_FEATURES; return the header of the reply."""
    sock.sendall(GET_FEATURES)
    return sock.recv(VhostUserHeader.SIZE)


def test_a_silent_process_does_not_keep_the_device(tmp_path):
    device, operator = tmp_path / "b", tmp_path / "c"
    with Served("--vhost-user", device, "--control", operator) as served:
        silent = connected(device)
        connected(operator).close()
        with ControlClient(operator) as client:
            while not client.execute("query-status")["connected"]:
                pass  # each query waits for its answer
            status = client.execute("query-status")
        assert status["peer-pid"] == os.getpid()
        assert [problem["name"] for problem in status["problems"]] == ["silent-front-end"]
        with connected(device) as other:
            other.settimeout(40)
            assert ask(other)
            silent.settimeout(10)
            assert silent.recv(1) == b""
        silent.close()
        _, said = served.end()
    assert (
        f"another front-end waits; the device serves one at a time, and process {os.getpid()}"
        in said
    )
    assert f"process {os.getpid()} has sent no message: disconnected" in said
    assert "Traceback" not in said


def test_a_front_end_that_has_spoken_keeps_the_device(tmp_path):
    device = tmp_path / "b"
    with Served("--vhost-user", device) as served, connected(device) as first:
        first.settimeout(20)
        assert ask(first)
        with connected(device) as second:
            second.sendall(GET_FEATURES)
            second.settimeout(7.5)  # a silent one is given at most 6.7 s
            with pytest.raises(TimeoutError):
                second.recv(1)
            assert ask(first)
        _, said = served.end()
    assert said.count("another front-end waits") == 1
