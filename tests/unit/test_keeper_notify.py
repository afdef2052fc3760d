# SPDX-License-Identifier: Apache-2.0
"""The notification protocol: building, parsing and refusing datagrams, and the store."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdsocket import receive_some
from vballoon.keeper.handover import replace
from vballoon.keeper.kcmp import same_file
from vballoon.keeper.notifier import Notifier, inherited
from vballoon.keeper.notify import (
    DATAGRAM_MAX,
    Notification,
    NotifyError,
    build_barrier,
    build_remove,
    build_store,
    parse,
)
from vballoon.keeper.store import NAME_MAX, OWNED_MAX, Store


@pytest.fixture
def fd():
    number = os.eventfd(0, os.EFD_CLOEXEC)
    yield number
    os.close(number)


def open_fds():
    return len(os.listdir("/proc/self/fd"))


def test_what_is_built_is_read_back():
    assert parse(build_store("n1"), 1) == Notification(store=True, name="n1", poll=False)
    assert parse(build_remove("n1"), 0) == Notification(remove=True, name="n1")
    assert parse(build_barrier(), 1) == Notification(barrier=True)
    said = parse(b"READY=1\nSTATUS=serving vm1\nRELOADING=0\nX_OTHER=1", 0)
    assert said == Notification(ready=True, status="serving vm1")


@pytest.mark.parametrize(
    ("data", "fds", "rule"),
    [
        (b"FDSTORE=1", 0, "notify-fds"),
        (b"READY=1", 1, "notify-fds"),
        (b"FDSTORE=1", 254, "notify-fds"),
        (b"FDSTORE=1\nFDNAME=" + b"n" * 256, 1, "notify-name"),
        (b"FDSTORE=1\nFDNAME=a:b", 1, "notify-name"),
        (b"FDSTORE=1\nFDNAME=a\x07", 1, "notify-name"),
        (b"FDSTORE=1\nFDNAME=", 1, "notify-name"),
        (b"FDSTORE=1\nFDSTOREREMOVE=1", 1, "notify-store"),
        (b"BARRIER=1", 0, "notify-barrier"),
        (b"BARRIER=1", 2, "notify-barrier"),
        (b"BARRIER=1\nFDSTORE=1", 1, "notify-barrier"),
        (b"\xff\xfe", 0, "notify-text"),
        (b"A" * (DATAGRAM_MAX + 1), 0, "notify-size"),
    ],
)
def test_what_breaks_the_protocol_is_refused(data, fds, rule):
    with pytest.raises(NotifyError) as caught:
        parse(data, fds)
    assert caught.value.rule == rule


@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_datagram_is_read_or_refused(data, fds):
    try:
        said = parse(data, fds)
    except NotifyError:
        return
    assert said.status is None or said.status.isprintable()


def test_the_notifier_sends_what_the_parser_reads(fd):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours:
        notifier = Notifier(theirs)
        notifier.store("n7", fd)
        data, fds = receive_some(ours, DATAGRAM_MAX + 1)
        assert parse(data, len(fds)).name == "n7"
        assert same_file(fds[0], fd)
        os.close(fds[0])
        for call, said in ((notifier.ready, "ready"), (notifier.watchdog, "watchdog")):
            call()
            assert getattr(parse(*map_fds(receive_some(ours, 4096))), said)
        notifier.close()


def map_fds(received):
    data, fds = received
    return data, len(fds)


def test_a_barrier_waits_until_its_descriptor_is_closed(fd):
    """A child plays the keeper: it reads both datagrams, and its end closes the descriptor."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    notifier = Notifier(theirs)
    notifier.store("n1", fd)
    pid = os.fork()
    if not pid:
        theirs.close()
        said = [receive_some(ours, 4096)[0] for _ in range(2)]
        os._exit(0 if said == [build_store("n1"), build_barrier()] else 1)
    ours.close()
    assert notifier.barrier()
    assert os.waitpid(pid, 0)[1] == 0
    notifier.close()


def test_a_supervisor_that_is_gone_stops_nobody(fd):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    before = open_fds()
    notifier = Notifier(theirs)
    ours.close()
    notifier.store("n1", fd)
    assert not notifier.alive
    assert not notifier.barrier()
    assert open_fds() == before - 1
    notifier.close()


def test_inherited_descriptors_have_names_once():
    pid = os.fork()
    if not pid:
        env = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "journal"}
        reader, writer = os.pipe()
        if (reader, writer) != (3, 4):
            os.dup2(reader, 3), os.dup2(writer, 4)
        good = inherited(env) == [("journal", 3), ("unknown", 4)] and env == {}
        good = good and not os.get_inheritable(3) and inherited(env) == []
        os._exit(0 if good else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert inherited({"LISTEN_PID": "1", "LISTEN_FDS": "2"}) == []


def test_the_store_keeps_an_open_file_once(fd):
    store = Store()
    copy, again = os.dup(fd), os.dup(fd)
    before = open_fds()
    assert store.add("a", "n1", [copy]) == [copy]
    assert store.add("a", "n2", [again]) == []
    assert store.of("a") == [("n1", copy)]
    assert open_fds() == before - 1
    assert store.remove("a", "n1") == 1
    assert store.remove("a", "n1") == 0
    assert open_fds() == before - 2


def test_two_eventfds_are_two_files(fd):
    """All eventfds share one inode: only kcmp distinguishes them."""
    other = os.eventfd(0)
    assert os.fstat(fd).st_ino == os.fstat(other).st_ino
    assert not same_file(fd, other)
    os.close(other)
    with pytest.raises(OSError, match="Bad file"):
        same_file(fd, other)


def test_the_store_has_limits():
    store = Store()
    before = open_fds()
    for number in range(OWNED_MAX):
        store.add("a", f"n{number}", [os.eventfd(0)])
    for name, rule in (("one", "store-limit"), ("n" * (NAME_MAX + 1), "store-limit")):
        with pytest.raises(NotifyError) as caught:
            store.add("a", name, [os.eventfd(0)])
        assert caught.value.rule == rule
    assert len(store.discard("a")) == OWNED_MAX
    assert open_fds() == before
    assert store.owners() == []


def test_a_hand_over_that_fails_leaves_every_descriptor_as_it_was(monkeypatch):
    """The names of very many machines can be too long for exec; then this program continues."""

    def held():
        found = {}
        for number in range(3, 64):
            with contextlib.suppress(OSError):
                link = os.readlink(f"/proc/self/fd/{number}")
                found[number] = (link, os.get_inheritable(number))
        return found

    store = Store()
    pipes = [os.pipe() for _ in range(4)]
    store.add("a", "n1", [fd for pipe in pipes for fd in pipe])
    before, handler = held(), signal.getsignal(signal.SIGHUP)
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(FileNotFoundError):
        replace(store)
    assert held() == before
    assert signal.getsignal(signal.SIGHUP) == handler
    store.discard("a")
