# SPDX-License-Identifier: Apache-2.0
"""A live snapshot with a made-up QEMU, guest and tracker: no write is lost, whenever it comes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tests.fakes.memory import memfd
from tests.fakes.qemu_monitor import FakeQemu

from vballoon.errors import UsageError
from vballoon.memory import ByteRanges, PageRanges
from vballoon.snapshot import live, tracker
from vballoon.snapshot.pipe import StreamStore
from vballoon.snapshot.qmp_vm import QemuVm
from vballoon.snapshot.run import Observer, Options, Run
from vballoon.snapshot.source import GuestSource, RamFile
from vballoon.snapshot.store import DirectoryStore
from vballoon.snapshot.take import take
from vballoon.snapshot.tracker import PRESENT, SOFT_DIRTY, marked, objections

PAGE = 4096
PAGES = 64
DATA = 32
"""Pages of data at first; the others are holes."""


class Guest:
    """Memory whose writes are noted, for whoever asks."""

    qemu: FakeQemu

    def __init__(self) -> None:
        self.fd = memfd(PAGES * PAGE)
        self.host = self.qemu.map_memory(self.fd)
        os.pwrite(self.fd, os.urandom(DATA * PAGE), 0)
        self.written: set[int] = set()
        self.started = 0

    def write(self, *pages: int) -> None:
        for page in pages:
            os.pwrite(self.fd, os.urandom(PAGE), page * PAGE)
            self.written.add(page)

    def start(self) -> None:
        self.written = set()
        self.started += 1

    def collect(self) -> list[ByteRanges]:
        pages, self.written = sorted(self.written), set()
        return [PageRanges.of((p, p + 1) for p in pages).bytes()]


class BlindGuest(Guest):
    def collect(self) -> list[ByteRanges]:
        super().collect()
        return [ByteRanges()]


class Control:
    """The control socket of a back-end whose guest walks or hints as the test sets."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.lacks: set[str] = set()
        self.complete = True
        self.asked: list[str] = []
        self.tracked_when_asked = False

    def execute(self, command: str, arguments: Any = None) -> Any:
        if command.startswith("start-"):
            self.asked.append(command)
        self.tracked_when_asked = self.guest.started > 0
        if command == "query-status":
            return {"pid": os.getpid()}
        if command in self.lacks:
            raise UsageError("the driver lacks it")
        return {"round": 7}

    def wait_event(self, name: str, timeout: float) -> Any:
        return {"event": name, "data": {"round": 7, "complete": self.complete}}


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[FakeQemu]:
    with FakeQemu(tmp_path / "qmp", PAGES * PAGE) as served:
        Guest.qemu = served
        yield served


@pytest.fixture
def vm(qemu: FakeQemu, tmp_path: Path) -> Iterator[QemuVm]:
    with QemuVm(tmp_path / "qmp") as connected:
        yield connected


@pytest.fixture(autouse=True)
def reported_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report the pages 8 to 16 and 40 to 48 as free."""
    ranges = PageRanges([8, 40], [16, 48])
    monkeypatch.setattr(live, "export", lambda control, provenance: ranges)
    monkeypatch.setattr(live, "ENOUGH", 3 * PAGE)


def make(
    vm: QemuVm, guest: Guest, folder: Path, control: Control, *, hint: bool = True, **more: Any
) -> Run:
    ram = RamFile(guest.fd, PAGES * PAGE, [(0, PAGES * PAGE, 0)], guest.host)
    source = GuestSource([ram], None, "no module", None, None)
    store = DirectoryStore(folder / "snap")
    return Run(
        vm,
        source,
        store,
        Options(live=True, hint=hint),
        control=cast(Any, control),
        make_tracker=lambda blocks: guest,
        **more,
    )


class Busy(Observer):
    """The guest writes at every moment that there is: *plan* has pages by step or round."""

    def __init__(self, guest: Guest, plan: dict[str, tuple[int, ...]]) -> None:
        self.guest, self.plan, self.rounds = guest, plan, 0

    def step(self, name: str) -> None:
        self.guest.write(*self.plan.pop(name, ()))

    def size(self, total: int) -> None:
        self.rounds += 1

    def copied(self, done: int) -> None:
        self.guest.write(*self.plan.pop(f"round {self.rounds}", ()))


PLAN = {
    "ask": (9, 33),  # reported free a moment later
    "unplug": (10, 2),
    "rounds": (41,),
    "round 1": (3, 11, 42, 20, 21, 22, 23),  # copied already, and reported free
    "round 2": (3, 12, 24, 34, 35),
    "stop": (13, 43),
}


def content(folder: Path) -> bytes:
    return (folder / "snap" / "mem.ram").read_bytes()


def check(guest: Guest, folder: Path, left_out: set[int]) -> None:
    now, copied = os.pread(guest.fd, PAGES * PAGE, 0), content(folder)
    for page in range(PAGES):
        here = slice(page * PAGE, (page + 1) * PAGE)
        assert copied[here] == (bytes(PAGE) if page in left_out else now[here]), page


def test_no_write_is_lost(qemu: FakeQemu, vm: QemuVm, tmp_path: Path) -> None:
    guest = Guest()
    control = Control(guest)
    seen = Busy(guest, dict(PLAN))
    manifest = take(make(vm, guest, tmp_path, control, observer=seen))
    assert control.tracked_when_asked
    assert seen.rounds >= 3
    check(guest, tmp_path, {8, 14, 15})
    assert manifest.verification == "no module"
    assert qemu.whole


def test_tracker_that_tells_nothing_would_lose_them(
    qemu: FakeQemu, vm: QemuVm, tmp_path: Path
) -> None:
    """The test above can fail."""
    guest = BlindGuest()
    take(make(vm, guest, tmp_path, Control(guest), observer=Busy(guest, dict(PLAN))))
    with pytest.raises(AssertionError):
        check(guest, tmp_path, {8, 14, 15})


def test_page_that_was_discarded_meanwhile_is_blank(
    qemu: FakeQemu, vm: QemuVm, tmp_path: Path
) -> None:
    guest = Guest()
    libc_punch = 0x03  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

    class Discards(Observer):
        def copied(self, done: int) -> None:
            import ctypes

            libc = ctypes.CDLL(None)
            libc.fallocate64(
                guest.fd, libc_punch, ctypes.c_int64(20 * PAGE), ctypes.c_int64(4 * PAGE)
            )

    manifest = take(make(vm, guest, tmp_path, Control(guest), observer=Discards()))
    copied = content(tmp_path)
    assert copied[20 * PAGE : 24 * PAGE] == bytes(4 * PAGE)
    with (tmp_path / "snap" / "mem.ram").open("rb") as file:
        assert os.lseek(file.fileno(), 20 * PAGE, os.SEEK_HOLE) == 20 * PAGE
    check(guest, tmp_path, set(range(8, 16)))
    assert manifest.memory[0].data == (DATA - 8 - 4) * PAGE


@pytest.mark.parametrize(
    ("lacks", "complete", "asked", "left_out"),
    [
        (set(), True, ["start-walk"], set(range(8, 16))),
        ({"start-walk"}, True, ["start-walk", "start-hinting"], set(range(8, 16))),
        ({"start-walk", "start-hinting"}, True, ["start-walk", "start-hinting"], set()),
        (set(), False, ["start-walk", "start-hinting"], set()),
    ],
)
def test_guest_is_asked_for_what_it_can_tell(
    qemu: FakeQemu,
    vm: QemuVm,
    tmp_path: Path,
    lacks: set[str],
    complete: bool,
    asked: list[str],
    left_out: set[int],
) -> None:
    guest = Guest()
    control = Control(guest)
    control.lacks, control.complete = lacks, complete
    take(make(vm, guest, tmp_path, control))
    assert control.asked == asked
    check(guest, tmp_path, left_out)


def test_hinting_is_used_only_by_request(qemu: FakeQemu, vm: QemuVm, tmp_path: Path) -> None:
    """A guest with init_on_alloc writes what it hints, so that more would be copied, not less."""
    guest = Guest()
    control = Control(guest)
    control.lacks = {"start-walk"}
    take(make(vm, guest, tmp_path, control, hint=False))
    assert control.asked == ["start-walk"]
    check(guest, tmp_path, set())


def test_guest_that_never_rests_is_stopped_in_the_end(
    qemu: FakeQemu, vm: QemuVm, tmp_path: Path
) -> None:
    guest = Guest()

    class Restless(Observer):
        def copied(self, done: int) -> None:
            if qemu.status == "running":
                guest.write(*range(DATA))

    take(make(vm, guest, tmp_path, Control(guest), observer=Restless()))
    check(guest, tmp_path, set())
    assert qemu.log.count("stop") <= live.ROUNDS_MAX
    assert qemu.whole


def test_guest_stands_still_in_the_last_round_however_slowly_it_came_to_rest(
    qemu: FakeQemu, vm: QemuVm, tmp_path: Path
) -> None:
    """Less is written from round to round, and after the last one it is still not little."""
    guest, seen = Guest(), []
    sizes = [30, 22, 16, 11, 8, 5]
    assert len(sizes) == live.ROUNDS_MAX
    assert all(b <= a * 3 // 4 for a, b in itertools.pairwise(sizes))

    class Calming(Observer):
        def step(self, name: str) -> None:
            if name == "copy":
                seen.append(qemu.status)

        def size(self, total: int) -> None:
            if qemu.status == "running":
                guest.write(*range(sizes.pop(0)))

    take(make(vm, guest, tmp_path, Control(guest), observer=Calming()))
    assert not sizes
    assert seen == ["paused"]
    check(guest, tmp_path, set())
    assert qemu.whole


def test_tracking_begins_while_the_guest_stands(qemu: FakeQemu, vm: QemuVm, tmp_path: Path) -> None:
    """What a disk is writing at that moment would be missed."""
    states = []

    class Watching(Guest):
        def start(self) -> None:
            states.append(qemu.status)
            super().start()

    guest = Watching()
    take(make(vm, guest, tmp_path, Control(guest)))
    assert states == ["paused"]


def test_network_that_another_process_writes_is_refused(
    qemu: FakeQemu, vm: QemuVm, tmp_path: Path
) -> None:
    qemu.networks = (
        "n0: index=0,type=nic,model=virtio-net-pci\n \\ hub: index=0,type=vhost-user,x\n"
    )
    guest = Guest()
    with pytest.raises(UsageError, match="type=vhost-user"):
        take(make(vm, guest, tmp_path, Control(guest)))
    assert qemu.whole
    assert "device_del" not in qemu.log


def test_killed_between_rounds_the_note_is_right(
    qemu: FakeQemu, vm: QemuVm, tmp_path: Path
) -> None:
    """A fault in the second round: the guest was stopped and resumed, and its balloon is out."""
    guest = Guest()

    class Fault(Busy):
        def copied(self, done: int) -> None:
            super().copied(done)
            if self.rounds == 2:
                raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match="No space"):
        take(make(vm, guest, tmp_path, Control(guest), observer=Fault(guest, dict(PLAN))))
    assert qemu.whole
    assert not (tmp_path / "snap").exists()


def test_stream_cannot_be_live(qemu: FakeQemu, vm: QemuVm, tmp_path: Path) -> None:
    guest = Guest()
    snapshot = make(vm, guest, tmp_path, Control(guest))
    snapshot.store = StreamStore(memfd(0))
    with pytest.raises(UsageError, match="needs a directory"):
        take(snapshot)
    assert "device_del" not in qemu.log


def test_marks_are_read_as_the_kernel_documents_them() -> None:
    entries = np.full(8, PRESENT, np.uint64)
    entries[2] |= SOFT_DIRTY
    entries[3] |= SOFT_DIRTY
    entries[6] = 0  # not there: its mark went with it
    assert marked(entries, first=10).tolist() == [[12 * PAGE, 14 * PAGE], [16 * PAGE, 17 * PAGE]]
    assert not marked(np.full(4, PRESENT, np.uint64)).size


def test_conditions_of_the_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swaps, huge = tmp_path / "swaps", tmp_path / "huge"
    swaps.write_text("Filename Type Size Used Priority\n")
    huge.write_text("always within_size advise [never] deny force\n")
    monkeypatch.setattr(tracker, "SWAPS", swaps)
    monkeypatch.setattr(tracker, "SHMEM_HUGE", huge)
    monkeypatch.setattr(tracker, "_kernel_marks", lambda: True)
    assert objections() == ""
    huge.write_text("[always] within_size advise never deny force\n")
    assert "must say never" in objections()
    swaps.write_text("Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n")
    assert "swaps" in objections()
    monkeypatch.setattr(tracker, "_kernel_marks", lambda: False)
    assert "does not track" in objections()
