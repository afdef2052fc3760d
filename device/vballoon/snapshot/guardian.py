# SPDX-License-Identifier: Apache-2.0
"""The guardian's program: read journal entries until the input ends, then undo the last one.

It starts while a snapshot begins, so it imports what undoing needs only when it has to undo.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vballoon.snapshot.journal import Entry
    from vballoon.snapshot.qmp_vm import QemuVm

__all__ = ("main",)

CONNECT_SECONDS = 20.0
"""How long the monitor may take to be free after the snapshot has died."""
LATE_SECONDS = 0.5
"""Pause between two looks at a guest that has not released the balloon yet."""


def main() -> int:
    """Guard one snapshot. Return 1 if something could not be undone."""
    last = b""
    for line in sys.stdin.buffer:
        if line.endswith(b"\n"):  # an entry that was cut short was never acted upon
            last = line
    if not last or not json.loads(last)["qmp"]:
        return 0
    from vballoon.snapshot.journal import Entry, JournalFile

    entry = Entry.loads(last)
    if not entry.pending:
        return 0
    say("undoing what the snapshot did")
    troubles, left = _undo(entry, CONNECT_SECONDS)
    if left.unplug and not (left.gone or left.over):
        troubles, left = _wait_for_release(troubles, left)
    if entry.file:
        JournalFile(entry.file).write(left)
    for trouble in troubles:
        say(trouble)
    return 1 if troubles else 0


def say(text: str) -> None:
    """Print *text* on standard error, which may be closed, and write it to the system log."""
    import syslog

    syslog.syslog(syslog.LOG_WARNING, f"vballoon: {text}")
    with contextlib.suppress(OSError):
        print(f"vballoon: {text}", file=sys.stderr, flush=True)


def _detach() -> None:
    """Close standard error: whoever reads it is not to wait for this process."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def _undo(entry: Entry, seconds: float) -> tuple[list[str], Entry]:
    from vballoon.errors import UsageError
    from vballoon.snapshot.recovery import undo

    try:
        with _connect(entry.qmp, seconds) as vm:
            return undo(vm, entry)
    except UsageError as error:
        return [str(error)], entry


def _wait_for_release(troubles: list[str], entry: Entry) -> tuple[list[str], Entry]:
    """Look again and again until the guest has released the balloon or QEMU has ended.

    Connect for each look only: a monitor takes one client.
    """
    from vballoon.snapshot import recovery
    from vballoon.snapshot.journal import Entry
    from vballoon.snapshot.process import Process
    from vballoon.snapshot.qmp_vm import QemuClosed, QemuGone, QemuVm

    process = Process(int(entry.qemu.partition(":")[0] or 0))
    for trouble in troubles:
        say(trouble)
    _detach()
    while entry.unplug and any(recovery.LATE in trouble for trouble in troubles):
        time.sleep(LATE_SECONDS)
        if process.name != entry.qemu:
            return ["QEMU has ended, so nothing is left to undo"], Entry(entry.qmp)
        try:
            with QemuVm(entry.qmp, timeout=2) as vm:
                troubles, entry = recovery.undo(vm, entry, release_seconds=0)
        except QemuClosed:
            return ["QEMU's monitor is closed, so the balloon is not plugged in again"], entry
        except QemuGone:
            pass  # somebody else uses the monitor now
    return troubles, entry


def _connect(path: str, seconds: float) -> QemuVm:
    from vballoon.errors import UsageError
    from vballoon.snapshot.qmp_vm import QemuVm

    deadline = time.monotonic() + seconds
    while True:
        try:
            return QemuVm(path, timeout=2)
        except UsageError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
