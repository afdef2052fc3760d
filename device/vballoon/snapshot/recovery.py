# SPDX-License-Identifier: Apache-2.0
"""Undo what a snapshot has done to a machine.

When a step fails, the snapshot itself undoes what its journal says.  When it is killed, the
guardian does: a process that outlives it and has been sent every entry of the journal.  Undoing
acts on the state that QEMU reports now, not on the state that it should have.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import TYPE_CHECKING, Self

from vballoon.errors import VballoonError
from vballoon.snapshot.device import plug, wait_until_gone
from vballoon.snapshot.journal import Entry
from vballoon.snapshot.qmp_vm import QemuGone
from vballoon.snapshot.state import migration_over, set_ignore_shared

if TYPE_CHECKING:
    from collections.abc import Callable

    from vballoon.snapshot.qmp_vm import QemuVm

__all__ = ("Guardian", "undo")

UNPLUG_SECONDS = 15.0
"""How long a guest that was asked to release the balloon may still do so."""
CANCEL_SECONDS = 5.0
"""How long a migration may still run before it is cancelled."""

GONE = (
    "the whole machine was sent and may run elsewhere, so it is left stopped here; "
    "if it does not run elsewhere, resume it with 'cont' on QEMU's monitor"
)


def undo(vm: QemuVm, entry: Entry) -> list[str]:
    """Undo what *entry* says. Return a message for each thing that could not be undone."""
    if entry.gone:
        return [GONE]
    troubles: list[str] = []

    def attempt(what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except QemuGone as error:
            troubles.append(str(error))
        except VballoonError as error:
            troubles.append(f"{what}: {error}")

    if entry.migrate:
        attempt("migration", lambda: migration_over(vm, CANCEL_SECONDS))
        attempt("capability", lambda: set_ignore_shared(vm, entry.ignore_shared))
    if entry.stop:
        attempt("the guest is still stopped", lambda: _resume(vm))
    if entry.unplug:
        attempt("the balloon is not plugged in again", lambda: _plug_again(vm, entry))
    return troubles


def _resume(vm: QemuVm) -> None:
    if vm.status() != "running":
        vm.execute("cont")


def _plug_again(vm: QemuVm, entry: Entry) -> None:
    if wait_until_gone(vm, entry.device_path, UNPLUG_SECONDS):
        plug(vm, entry.device, entry.chardev)


class Guardian:
    """A process that undoes the last entry it was sent when this process dies.

    A context manager: leaving it dismisses the guardian.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vballoon.snapshot.guardian"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's signals are not meant for the guardian
        )

    def send(self, entry: Entry) -> None:
        """Make *entry* the one that is undone when this process dies."""
        assert self._process.stdin is not None
        self._process.stdin.write(entry.dumps())
        self._process.stdin.flush()

    def dismiss(self) -> None:
        """End the guardian; nothing is left to be undone."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(OSError):
                self.send(Entry("", over=True))
                self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.dismiss()
