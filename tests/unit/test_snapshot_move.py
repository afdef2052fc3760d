# SPDX-License-Identifier: Apache-2.0
"""A move: the state tables, and both sides over a link that breaks wherever it can."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.memory import memfd
from tests.fakes.qemu_monitor import FakeQemu, event

from vballoon.errors import UsageError
from vballoon.snapshot.journal import JournalFile
from vballoon.snapshot.link import Link, LinkLost
from vballoon.snapshot.move import (
    Destination,
    DestinationInput,
    Source,
    SourceInput,
    destination,
    source,
)
from vballoon.snapshot.pipe import MoveStore
from vballoon.snapshot.qmp_vm import QemuVm
from vballoon.snapshot.receive import PENDING_FILE, Receiver, require_decided
from vballoon.snapshot.recovery import GONE, undo_file
from vballoon.snapshot.run import Observer, Options, Run
from vballoon.snapshot.send import Sender
from vballoon.snapshot.source import GuestSource, RamFile
from vballoon.snapshot.store import open_snapshot
from vballoon.snapshot.take import take
from vballoon_spec.snapshot import Frame, FrameKind

PAGE = 4096
SIZE = 16 * PAGE


def reached(step: Callable[[Any, Any], Any], first: Any, events: Any) -> dict[Any, set[Any]]:
    """All states that can be reached, and from each what can be reached afterwards."""
    after = {state: {step(state, e) for e in events} for state in type(first)}
    for _ in after:
        for state in after:
            after[state] |= set().union(*(after[s] for s in after[state]))
    return after


def test_source_never_resumes_after_gone() -> None:
    after = reached(source, Source.SENDING, SourceInput)
    assert Source.ABORTED not in after[Source.GONE]
    assert {Source.DONE, Source.UNDECIDED, Source.ABORTED} <= after[Source.SENDING]
    for state in (Source.DONE, Source.ABORTED, Source.UNDECIDED):
        assert after[state] == {state}


def test_source_is_gone_only_after_verified_and_noted() -> None:
    for state, happens in itertools.product(Source, SourceInput):
        if source(state, happens) is Source.GONE and state is not Source.GONE:
            assert (state, happens) == (Source.ACCEPTED, SourceInput.NOTED)
        if source(state, happens) is Source.DONE and state is not Source.DONE:
            assert (state, happens) == (Source.GONE, SourceInput.RUNNING)


def test_destination_runs_only_on_commit() -> None:
    after = reached(destination, Destination.RECEIVING, DestinationInput)
    for state, happens in itertools.product(Destination, DestinationInput):
        if destination(state, happens) is Destination.COMMITTED and state != Destination.COMMITTED:
            assert (state, happens) == (Destination.VERIFIED, DestinationInput.COMMIT)
        if destination(state, happens) is Destination.RUNNING and state is not Destination.RUNNING:
            assert (state, happens) == (Destination.COMMITTED, DestinationInput.STARTED)
    for state in (Destination.DROPPED, Destination.UNDECIDED, Destination.FAILED):
        assert after[state] == {state}


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[FakeQemu]:
    with FakeQemu(tmp_path / "qmp", SIZE) as served:
        yield served


@pytest.fixture
def vm(qemu: FakeQemu, tmp_path: Path) -> Iterator[QemuVm]:
    with QemuVm(tmp_path / "qmp") as connected:
        yield connected


@pytest.fixture
def guest(qemu: FakeQemu) -> Iterator[GuestSource]:
    fd = memfd(SIZE)
    os.pwrite(fd, os.urandom(SIZE // 2), 0)
    ram = RamFile(fd, SIZE, [(0, SIZE, 0)], qemu.map_memory(fd))
    with GuestSource([ram], None, "no module", None, None) as made:
        yield made


@contextlib.contextmanager
def two_ends() -> Iterator[tuple[Link, Link]]:
    left, right = socket.socketpair()
    with left, right:
        links = [Link(os.dup(s.fileno()), os.dup(s.fileno()), silence=20) for s in (left, right)]
    with links[0], links[1]:
        yield links[0], links[1]


class Said(Observer):
    def __init__(self) -> None:
        self.said = list[str]()

    def say(self, text: str) -> None:
        self.said.append(text)


def move(vm: QemuVm, guest: GuestSource, other: Callable[[Link], None], seen: Observer) -> Run:
    """Send the machine, with *other* at the other end of the link."""
    with two_ends() as (here, there):

        def run() -> None:
            with there:
                other(there)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            store = MoveStore(here)
            moving = Run(vm, guest, store, Options(move=True, quit=True), seen)
            moving.sender = Sender(here, store)
            take(moving)
        finally:
            here.close()
            thread.join(30)
            assert not thread.is_alive()
    return moving


def whole(folder: Path) -> Path:
    (folder / "there").mkdir(exist_ok=True)
    return folder / "there"


def test_machine_moves(qemu: FakeQemu, vm: QemuVm, guest: GuestSource, tmp_path: Path) -> None:
    states = []

    def other(link: Link) -> None:
        receiver = Receiver(link, whole(tmp_path))
        receiver.receive()
        states.append(qemu.status)
        with pytest.raises(UsageError, match="--commit"):
            require_decided(tmp_path / "there")
        receiver.wait_commit()
        states.append(qemu.status)
        receiver.running()

    move(vm, guest, other, Said())
    assert states == ["paused", "paused"]
    assert qemu.status == "ended"
    assert "cont" not in qemu.log
    open_snapshot(tmp_path / "there")
    require_decided(tmp_path / "there")
    assert (tmp_path / "there" / "mem.ram").read_bytes() == os.pread(guest.files[0].fd, SIZE, 0)
    assert not (tmp_path / "qmp.journal").exists()


@pytest.mark.parametrize("less", [1, 3000])
def test_link_that_breaks_with_the_last_bytes_loses_nothing(
    qemu: FakeQemu, vm: QemuVm, guest: GuestSource, tmp_path: Path, less: int
) -> None:
    """A successful write() is no delivery: what was in flight is lost with the link."""

    def counting(link: Link) -> None:
        data = b""
        while b'"extra"' not in data or not data.endswith(b"}\n"):
            data += link.read(1)
        taken.append(len(data))

    def other(link: Link) -> None:
        left = [taken[0] - less]
        read = link.read

        def short(size: int) -> bytes:
            size = min(size, left[0])
            left[0] -= size
            return read(size)

        link.read = short  # type: ignore[method-assign]
        with pytest.raises(UsageError, match="ended early"):
            Receiver(link, whole(tmp_path)).receive()

    taken: list[int] = []
    with pytest.raises(UsageError, match="was not moved"):
        move(vm, guest, counting, Said())
    with pytest.raises(UsageError, match="was not moved"):
        move(vm, guest, other, Said())
    assert qemu.whole
    assert "quit" not in qemu.log


def test_destination_that_refuses_leaves_the_machine_here(
    qemu: FakeQemu, vm: QemuVm, guest: GuestSource, tmp_path: Path
) -> None:
    def other(link: Link) -> None:
        (whole(tmp_path) / "state").mkdir()  # it cannot be written
        with pytest.raises(UsageError, match="directory"):
            Receiver(link, tmp_path / "there").receive()

    with pytest.raises(UsageError, match=r"was not moved: the destination reports"):
        move(vm, guest, other, Said())
    assert qemu.whole


def test_commit_that_is_lost_leaves_both_stopped_with_instructions(
    qemu: FakeQemu, vm: QemuVm, guest: GuestSource, tmp_path: Path
) -> None:
    def other(link: Link) -> None:
        receiver = Receiver(link, whole(tmp_path))
        receiver.receive()
        link.receive()  # COMMIT, which nobody acts upon

    seen = Said()
    with pytest.raises(UsageError, match="not known whether"):
        move(vm, guest, other, seen)
    assert seen.said == [GONE]
    assert qemu.status == "paused"
    assert "cont" not in qemu.log
    assert (tmp_path / "there" / PENDING_FILE).exists()
    entry = JournalFile(tmp_path / "qmp.journal").read()
    assert entry is not None
    assert entry.gone
    vm.close()
    assert undo_file(tmp_path / "qmp.journal") == [GONE]
    assert qemu.status == "paused"
    assert undo_file(tmp_path / "qmp.journal", decision="abort") == []
    assert qemu.whole


def test_destination_without_commit_does_not_run(tmp_path: Path) -> None:
    from tests.unit.test_snapshot_pipe import STREAM

    with two_ends() as (here, there):
        here.write(b"VBMOVE01" + STREAM[8:])
        receiver = Receiver(there, whole(tmp_path))
        receiver.receive()
        kind, body = here.receive()
        assert kind == FrameKind.VERIFIED
        assert len(body) == 32
        here.close()
        with pytest.raises(UsageError, match="restore --commit"):
            receiver.wait_commit()
        assert receiver.state is Destination.UNDECIDED
        open_snapshot(tmp_path / "there")


@pytest.mark.parametrize(
    "message",
    [
        Frame(kind=FrameKind.COMMIT, length=32).build() + bytes(32),
        Frame(kind=FrameKind.RUNNING, length=0).build(),
        Frame(kind=99, length=0).build(),
        Frame(kind=FrameKind.COMMIT, length=1 << 40).build(),
        b"short",
    ],
    ids=["of another move", "unsolicited", "unknown", "too long", "short"],
)
def test_nothing_but_the_right_commit_runs_the_machine(tmp_path: Path, message: bytes) -> None:
    from tests.unit.test_snapshot_pipe import STREAM

    with two_ends() as (here, there):
        here.write(b"VBMOVE01" + STREAM[8:])
        receiver = Receiver(there, whole(tmp_path))
        receiver.receive()
        here.receive()
        here.write(message)
        here.close()
        with pytest.raises(UsageError):
            receiver.wait_commit()
        assert receiver.state is Destination.UNDECIDED
        assert (tmp_path / "there" / PENDING_FILE).exists()


@pytest.mark.parametrize(
    "answer",
    [
        Frame(kind=FrameKind.VERIFIED, length=32).build() + bytes(32),
        Frame(kind=FrameKind.RUNNING, length=32).build() + bytes(32),
        Frame(kind=77, length=0).build(),
        b"",
    ],
    ids=["of another move", "too early", "unknown", "none"],
)
def test_nothing_but_the_right_verified_gives_the_machine_away(
    qemu: FakeQemu, vm: QemuVm, guest: GuestSource, tmp_path: Path, answer: bytes
) -> None:
    def other(link: Link) -> None:
        from vballoon.snapshot.pipe import unpack_from

        unpack_from(link.read, whole(tmp_path), b"VBMOVE01")
        link.write(answer)

    with pytest.raises(UsageError, match="was not moved"):
        move(vm, guest, other, Said())
    assert qemu.whole
    assert "quit" not in qemu.log


def test_guest_that_was_resumed_is_not_given_away(
    qemu: FakeQemu, vm: QemuVm, guest: GuestSource, tmp_path: Path
) -> None:
    """The destination receives ABORT and drops what it has."""
    states = []

    def other(link: Link) -> None:
        receiver = Receiver(link, whole(tmp_path))
        receiver.receive()
        with pytest.raises(UsageError, match="runs on at its old place"):
            receiver.wait_commit()
        states.append(receiver.state)

    class Resumes(Said):
        def step(self, name: str) -> None:
            if name == "offer":
                qemu.events.append(event("RESUME"))

    with pytest.raises(UsageError, match="somebody else has resumed"):
        move(vm, guest, other, Resumes())
    assert qemu.whole
    assert states == [Destination.DROPPED]


def test_silence_is_an_end() -> None:
    with two_ends() as (here, there):
        there.silence = 0.01
        with pytest.raises(LinkLost, match="silent"):
            there.receive()
        here.silence = 0.01
        with pytest.raises(LinkLost, match="silent"):
            here.write(bytes(64 << 20))


def test_link_to_a_command() -> None:
    with Link.run(["cat"], silence=20) as link:
        link.send(FrameKind.COMMIT, b"abc")
        assert link.receive() == (FrameKind.COMMIT, b"abc")
    with pytest.raises(UsageError, match="No such file"):
        Link.run(["/nowhere"], silence=20)
    with Link.run(["true"], silence=20) as link, pytest.raises(LinkLost):
        link.receive()


def test_link_over_a_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    made: list[Link] = []
    thread = threading.Thread(target=lambda: made.append(Link.listen(path, silence=20)))
    thread.start()
    while True:
        try:
            link = Link.connect(path, silence=20)
            break
        except UsageError:
            pass
    thread.join()
    with link, made[0]:
        link.send(FrameKind.RUNNING)
        assert made[0].receive() == (FrameKind.RUNNING, b"")
    assert not (tmp_path / "s").exists()
