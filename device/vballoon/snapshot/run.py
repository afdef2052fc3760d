# SPDX-License-Identifier: Apache-2.0
"""One run of a snapshot: what it was given, what its steps have found out, and who watches."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

    from vballoon.control.client import ControlClient
    from vballoon.memory import ByteRanges
    from vballoon.snapshot.device import BalloonDevice
    from vballoon.snapshot.journal import Journal
    from vballoon.snapshot.memmap import FreeMemory
    from vballoon.snapshot.process import Process
    from vballoon.snapshot.qmp_vm import Memdev, QemuVm
    from vballoon.snapshot.recovery import Guardian
    from vballoon.snapshot.send import Sender
    from vballoon.snapshot.source import GuestSource, RamFile
    from vballoon.snapshot.state import DeviceState
    from vballoon.snapshot.store import Store
    from vballoon.snapshot.tracker import WriteTracker
    from vballoon_spec.snapshot import SnapshotManifest, StateKind

__all__ = ("Copied", "Observer", "Options", "Plan", "Run", "Step")


class Observer:
    """Is notified of progress; this one ignores it. A context manager."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, name: str) -> None:
        """Step *name* begins."""

    def size(self, total: int) -> None:
        """*total* bytes will be copied."""

    def copied(self, done: int) -> None:
        """*done* more bytes are copied."""

    def say(self, text: str) -> None:
        """Show *text* to the operator."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the operator has chosen.

    ``device_id``: the balloon's id, where there are several; ``device_socket``: its back-end's
    socket; ``unplug_seconds``: how long the guest may take to release it;
    ``live``: copy while the guest runs; ``hint``: there, hint if the guest cannot walk;
    ``quit``: end QEMU when the snapshot is complete;
    ``move``: end QEMU when the guest runs at the destination;
    ``qemu_pid``: QEMU's process, 0: the one that listens on the monitor;
    ``journal``: path of the journal's file, empty: beside the monitor's socket.
    """

    device_id: str | None = None
    device_socket: str | None = None
    unplug_seconds: float = 20.0
    live: bool = False
    hint: bool = False
    quit: bool = False
    move: bool = False
    qemu_pid: int = 0
    journal: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be copied, found out before anything is changed."""

    kind: StateKind
    memdevs: list[Memdev]
    memory: list[tuple[Memdev, RamFile]]
    device: BalloonDevice
    qemu: dict[str, str]


@dataclass(frozen=True, slots=True)
class Copied:
    """Bytes copied of each file, and bytes left out by reason."""

    sizes: list[int]
    left_out: dict[str, int]


@dataclass(slots=True)
class Run:
    """One snapshot of *vm*, whose balloon's back-end gave *source*, into *store*.

    A live snapshot asks *control* for free pages and *make_tracker* for a tracker of the memory
    files' (address in QEMU, file).  *free_memory* finds the pages to leave out on the stopped
    guest; None: ``source.free_memory``.  The fields below ``journal`` are set by the steps.
    """

    vm: QemuVm
    source: GuestSource
    store: Store
    options: Options = Options()
    observer: Observer = field(default_factory=Observer)
    control: ControlClient | None = None
    make_tracker: Callable[[list[tuple[int, RamFile]]], WriteTracker] | None = None
    free_memory: Callable[[GuestSource], FreeMemory] | None = None
    times: dict[str, float] = field(default_factory=dict)
    """When each step began, by the monotonic clock, s."""
    journal: Journal = field(init=False)
    lock: int = -1
    guardian: Guardian | None = None
    sender: Sender | None = None
    """The source's side of a move."""
    resumes: int = 0
    """RESUME events that are not somebody else's."""
    process: Process = field(init=False)
    plan: Plan = field(init=False)
    state: DeviceState = field(init=False)
    stopped_ns: int = field(init=False)
    """UNIX time at which the guest was stopped for good."""
    tracker: WriteTracker = field(init=False)
    wanted: list[ByteRanges] = field(init=False)
    """For each file, the extents that are still to be copied: int64[k, 2], bytes."""
    free: FreeMemory | None = field(init=False)
    verification: str = field(init=False)
    """Why the free pages are not known, or ``""``."""
    copied: Copied = field(init=False)
    manifest: SnapshotManifest = field(init=False)

    def begin(self, name: str) -> None:
        """Note that step *name* begins now."""
        self.times[name] = time.monotonic()
        self.observer.step(name)

    def stop_guest(self) -> None:
        """Stop the guest."""
        with self.journal.doing(stop=True):
            self.vm.execute("stop")
        self.stopped_ns = time.time_ns()

    def resume_guest(self) -> None:
        """Resume the guest."""
        with self.journal.undoing("stop"):
            self.vm.execute("cont")
        self.resumes += 1

    def seconds(self) -> dict[str, float]:
        """Return how long each step took, and how long the guest was stopped (``stopped``)."""
        names, at = list(self.times), list(self.times.values())
        took = {n: round(b - a, 6) for n, a, b in zip(names, at, at[1:], strict=False)}
        if "stop" in self.times and "plug" in self.times:
            took["stopped"] = round(self.times["plug"] - self.times["stop"], 6)
        return took


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a snapshot: its name, what it does (for the documentation), and the function."""

    name: str
    what: str
    do: Callable[[Run], None]
