# SPDX-License-Identifier: Apache-2.0
"""The guardian's program: reads notes until its input ends, then goes back by the last one."""

from __future__ import annotations

import sys
import time

from vballoon.errors import UsageError
from vballoon.snapshot.qmp_vm import QemuVm
from vballoon.snapshot.recovery import Note, go_back

__all__ = ("main",)

CONNECT_SECONDS = 20.0
"""How long the monitor may take to be free after the snapshot has died."""


def main() -> int:
    """Guard; returns 1 when something could not be undone."""
    note = Note("", over=True)
    for line in sys.stdin.buffer:
        if line.endswith(b"\n"):  # one cut short was never acted upon
            note = Note.loads(line)
    if note.over:
        return 0
    print("vballoon: the snapshot was killed; undoing what it did", file=sys.stderr)
    try:
        with _connect(note.qmp) as vm:
            troubles = go_back(vm, note)
    except UsageError as error:
        troubles = [str(error)]
    for trouble in troubles:
        print(f"vballoon: {trouble}", file=sys.stderr)
    return 1 if troubles else 0


def _connect(path: str) -> QemuVm:
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return QemuVm(path, timeout=2)
        except UsageError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
