# SPDX-License-Identifier: Apache-2.0
"""A vfio-user server as a program: clients that come, go and die; descriptors; processor time."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from virtio_conformance.findings import Closed, not_applicable, require
from virtio_conformance.observe import EventFd
from virtio_conformance.vfio_user import Client
from virtio_formats.vfio_user import Command, DeviceInfo, Header, PciIrq

INFO = DeviceInfo(argsz=16, flags=0, num_regions=0, num_irqs=0).build()


@pytest.fixture
def session(client: Client) -> Client:
    """Return a client that has negotiated."""
    client.negotiate()
    return client


@pytest.mark.requirement("vf.robust.leak")
def test_repeated_set_up_leaves_nothing_behind(session: Client, target: Any) -> None:
    """The same interrupt set up many times holds one descriptor."""
    if not session.irq_info(PciIrq.MSIX).count:
        not_applicable("the device has no MSI-X")
    event = EventFd()
    session.set_irqs(PciIrq.MSIX, 0, [event.fd])
    held = len(target.process.fds())
    for _ in range(12):
        session.set_irqs(PciIrq.MSIX, 0, [event.fd])
    event.close()
    now = len(target.process.fds())
    require(now <= held, f"{now - held} descriptors more after 12 repetitions")


@pytest.mark.requirement("vf.robust.surplus-fds")
def test_surplus_descriptors(session: Client, target: Any) -> None:
    """Descriptors that a command does not bring are closed."""
    session.info()
    held = len(target.process.fds())
    event = EventFd()
    for _ in range(8):
        try:
            session.send(Command.DEVICE_GET_INFO, INFO, [event.fd] * 5)
            session.usable()
        except Closed:
            break
    event.close()
    if session.usable():
        now = len(target.process.fds())
        require(now <= held, f"{now - held} descriptors more than before")


@pytest.mark.requirement("vf.disconnect.no-exit", "vf.disconnect.cleanup")
def test_clients_come_and_go(target: Any, new_client: Any) -> None:
    """The server outlives its clients and leaks nothing of them."""
    held = -1
    for turn in range(4):
        client = new_client()
        client.negotiate()
        event = EventFd()
        if client.irq_info(PciIrq.MSIX).count:
            client.set_irqs(PciIrq.MSIX, 0, [event.fd])
        client.info()
        event.close()
        if turn == 1:
            held = len(target.process.fds())
        if turn == 3:
            now = len(target.process.fds())
            told = f"{now - held} descriptors more than two clients ago"
            require(now <= held, told, row="vf.disconnect.cleanup")
        client.close()
        require(not target.gone, "the server exits when its client leaves")


@pytest.mark.requirement("vf.robust.truncated")
@pytest.mark.parametrize("length", [1, 15, 16, 20])
def test_connection_ends_within_a_command(new_client: Any, length: int) -> None:
    """A client that dies within a command."""
    client = new_client()
    client.negotiate()
    raw = Header(id=9, command=Command.DEVICE_GET_INFO, size=32, flags=0, error=0).build() + INFO
    client.tap.send(raw[:length])
    client.close()
    fresh = new_client()
    fresh.negotiate()
    fresh.info()


@pytest.mark.requirement("vf.robust.idle-cpu")
def test_idle_server(session: Client, target: Any) -> None:
    """A server with a client that says nothing uses no processor time."""
    session.info()
    if target.options.polls:
        not_applicable("the server polls by design")
    target.process.expect_observable()
    share = min(target.process.cpu_share(0.3), target.process.cpu_share(0.3))
    require(share < 0.1, f"{share:.0%} of a processor while idle")


@pytest.mark.requirement("vf.program.sigterm", "vf.program.no-daemon")
def test_sigterm(session: Client, target: Any) -> None:
    """The program stays in the foreground and ends on SIGTERM."""
    if target.popen is None:
        not_applicable("the server was not started by the suite")
    target.process.expect_observable()
    row = "vf.program.no-daemon"
    require(not target.gone, "the program went into the background", row=row)
    group = os.getpgid(target.process.pid)
    require(group == target.popen.pid, "another program serves the socket", row=row)
    target.popen.terminate()
    for _ in range(150):
        if target.gone:
            return
        time.sleep(0.01)
    require(False, "SIGTERM does not end it within 1.5 s")
