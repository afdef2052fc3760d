# SPDX-License-Identifier: Apache-2.0
"""Undo what a snapshot has done to a machine.

When a step fails, the snapshot itself undoes what its journal says.  When it is killed, the
guardian does: a process that outlives it and has been sent every entry of the journal.  When both
are killed, ``vballoon snapshot --undo`` reads the journal's file.  Undoing acts on the state that
QEMU reports now, not on the state that it should have.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vballoon.errors import UsageError, VballoonError
from vballoon.snapshot.device import Release, plug, require_balloon, wait_until_gone
from vballoon.snapshot.journal import Entry, JournalFile
from vballoon.snapshot.lock import lock_vm
from vballoon.snapshot.process import Process
from vballoon.snapshot.qmp_vm import QemuGone, QemuVm
from vballoon.snapshot.state import migration_over, set_ignore_shared

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Guardian", "undo", "undo_file")

UNPLUG_SECONDS = 5.0
"""How long a guest that was asked to release the balloon may still do so before the guardian waits
for it instead."""
CANCEL_SECONDS = 5.0
"""How long a migration may still run before it is cancelled."""
QUIT_SECONDS = 60.0
"""How long QEMU may take to end: its disks may have much to write."""

GONE = (
    "the whole machine was sent and may run elsewhere, so it is left stopped here. If it does not "
    "run elsewhere, resume it with 'vballoon snapshot --undo --abort'; if it does, end it with "
    "'vballoon snapshot --undo --commit'"
)
OVER = (
    "the snapshot is complete and QEMU was to end; end it with "
    "'vballoon snapshot --undo --commit'. Only if the snapshot will never be restored, resume it "
    "with --abort"
)
LATE = "the guest has not released the balloon yet; it is plugged in again when it has"


def undo(
    vm: QemuVm, entry: Entry, *, release_seconds: float | None = None
) -> tuple[list[str], Entry]:
    """Undo what *entry* says; a guest may take *release_seconds* to release the balloon.

    Return a message for each thing that could not be undone, and an entry of what is left.
    """
    if entry.gone or entry.over:
        return [GONE if entry.gone else OVER], entry
    seconds = UNPLUG_SECONDS if release_seconds is None else release_seconds
    troubles: list[str] = []
    left = entry

    def attempt(flag: str, what: str, action: Callable[[], object]) -> None:
        nonlocal left
        if not getattr(entry, flag):
            return
        try:
            action()
        except QemuGone as error:
            troubles.append(str(error))
        except VballoonError as error:
            troubles.append(f"{what}: {error}")
        else:
            done: dict[str, Any] = {flag: False}
            left = replace(left, **done)

    attempt("migrate", "QEMU's migration is not as it was", lambda: _end_migration(vm, entry))
    attempt("stop", "the guest is still stopped", lambda: _resume(vm))
    attempt(
        "unplug", "the balloon is not plugged in again", lambda: _plug_again(vm, entry, seconds)
    )
    return troubles, left


def _end_migration(vm: QemuVm, entry: Entry) -> None:
    migration_over(vm, CANCEL_SECONDS)
    set_ignore_shared(vm, entry.ignore_shared)


def _resume(vm: QemuVm) -> None:
    if vm.status() != "running":
        vm.execute("cont")


def _plug_again(vm: QemuVm, entry: Entry, seconds: float) -> None:
    """Plug the balloon in again when the guest has released it. Raise UsageError if it has not."""
    release = wait_until_gone(vm, entry.device_path, seconds)
    if release is Release.PENDING:
        raise UsageError(LATE)
    if release is Release.GONE:
        require_balloon(entry.device)
        plug(vm, entry.device, entry.chardev)


def undo_file(path: str | os.PathLike[str], *, decision: str = "") -> list[str]:
    """Undo what the journal at *path* says. Return what could not be undone.

    *decision*: of a machine that was sent or saved to end: ``"abort"`` resumes it, ``"commit"``
    ends QEMU; ``""`` leaves it stopped.  Raise :class:`~vballoon.errors.UsageError` where there is
    no journal, or a snapshot or its guardian is still at work.
    """
    file = JournalFile(path)
    entry = file.read()
    if entry is None:
        raise UsageError(f"{path}: no snapshot has to be undone")
    process = Process(int(entry.qemu.partition(":")[0] or 0))
    if not entry.qemu or process.name != entry.qemu:
        file.write(Entry(entry.qmp))
        return ["QEMU has ended since, so there is nothing to undo"]
    lock = lock_vm(process, entry.memory)
    try:
        with QemuVm(entry.qmp) as vm:
            if decision == "commit":
                if not (entry.gone or entry.over):
                    raise UsageError("the snapshot is not complete, so there is nothing to commit")
                end_qemu(vm)
                file.write(Entry(entry.qmp))
                return []
            if decision == "abort":
                entry = replace(entry, gone=False, over=False)
            troubles, left = undo(vm, entry)
            file.write(left)
            return troubles
    finally:
        os.close(lock)


def end_qemu(vm: QemuVm) -> None:
    """End QEMU. Raise UsageError if it does not end."""
    with contextlib.suppress(QemuGone):  # it may have ended before it answered
        vm.execute("quit")
    if not vm.wait_gone(QUIT_SECONDS):
        raise UsageError("QEMU does not end; do not resume it")


class Guardian:
    """A process that undoes the last entry it was sent when this process dies.

    It inherits *lock*, so that the VM stays locked until everything is undone.
    """

    def __init__(self, lock: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vballoon.snapshot.guardian"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(lock,),
            start_new_session=True,  # the terminal's signals are not meant for the guardian
        )
        self.pid = self._process.pid

    def send(self, entry: Entry) -> None:
        """Make *entry* the one that is undone when this process dies."""
        assert self._process.stdin is not None
        self._process.stdin.write(entry.dumps())
        self._process.stdin.flush()

    def dismiss(self) -> None:
        """End the guardian; nothing is left for it to undo. Safe to call twice."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(OSError):
                self.send(Entry(""))
                self._process.stdin.close()
        self._process.wait()

    def leave(self, entry: Entry) -> None:
        """Leave *entry* to the guardian to undo, as if this process had died."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self.send(entry)
            self._process.stdin.close()
        self._process.returncode = 0  # it outlives this process, which is not to warn about it
