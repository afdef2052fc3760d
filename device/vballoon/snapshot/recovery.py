# SPDX-License-Identifier: Apache-2.0
"""The way back: whatever a snapshot has done to a machine so far is undone.

Before each step the snapshot notes what it is about to do, and hands the note to a guardian, a
process that outlives it.  When a step fails, the snapshot itself goes back by its note; when it
is killed, the guardian does.  Going back looks at what QEMU says now, never at what should be.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from vballoon.errors import VballoonError
from vballoon.snapshot.device import plug, wait_until_gone
from vballoon.snapshot.qmp_vm import QemuGone
from vballoon.snapshot.state import migration_over, set_ignore_shared

if TYPE_CHECKING:
    from collections.abc import Callable

    from vballoon.snapshot.qmp_vm import QemuVm

__all__ = ("Guardian", "Note", "go_back")

UNPLUG_SECONDS = 15.0
"""How long a guest that was asked to let go of the balloon may still do so."""

MOVED = (
    "the machine has gone out as a whole and may run elsewhere, so it is left stopped here; "
    "'cont' on QEMU's monitor lets it run if it does not"
)


@dataclass(slots=True)
class Note:
    """What has been done, or is about to be."""

    qmp: str
    device_path: str = ""
    device: dict[str, Any] = field(default_factory=dict)
    chardev: dict[str, str] | None = None
    unplug: bool = False
    """The guest was asked to let go of the device."""
    stop: bool = False
    """The guest was running, and was stopped."""
    migrate: bool = False
    """QEMU was asked for the device state; then ``ignore_shared`` is to be set back to this."""
    ignore_shared: bool = False
    moved: bool = False
    """The last bytes of a moving machine are on their way: it may run elsewhere from now on."""
    over: bool = False
    """Nothing is left to be undone."""

    def dumps(self) -> bytes:
        """The note as a line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def loads(cls, line: bytes) -> Self:
        """Read a line of :meth:`dumps`."""
        return cls(**json.loads(line))


def go_back(vm: QemuVm, note: Note) -> list[str]:
    """Undo what *note* says; returns what could not be undone, in words."""
    if note.moved:
        return [MOVED]
    troubles: list[str] = []

    def attempt(what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except QemuGone as error:
            troubles.append(str(error))
        except VballoonError as error:
            troubles.append(f"{what}: {error}")

    if note.migrate:
        attempt("migration", lambda: migration_over(vm, 5.0))
        attempt("capability", lambda: set_ignore_shared(vm, note.ignore_shared))
    if note.stop:
        attempt("the guest is still stopped", lambda: _resume(vm))
    if note.unplug:
        attempt("the balloon is not plugged in again", lambda: _plug_again(vm, note))
    return troubles


def _resume(vm: QemuVm) -> None:
    if vm.status() != "running":
        vm.execute("cont")


def _plug_again(vm: QemuVm, note: Note) -> None:
    if wait_until_gone(vm, note.device_path, UNPLUG_SECONDS):
        plug(vm, note.device, note.chardev)


class Guardian:
    """A process that goes back by the last note when this one dies; a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vballoon.snapshot.guardian"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a signal for the terminal's job is not for the guardian
        )

    def note(self, note: Note) -> None:
        """From now on *note* counts."""
        assert self._process.stdin is not None
        self._process.stdin.write(note.dumps())
        self._process.stdin.flush()

    def dismiss(self) -> None:
        """Nothing is left to guard."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(OSError):
                self.note(Note("", over=True))
                self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.dismiss()
