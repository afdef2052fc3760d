# SPDX-License-Identifier: Apache-2.0
"""The guardian's program: reads notes until its input ends, then goes back by the last one.

It starts while the snapshot is in a hurry, so it loads what it needs only when it is needed.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vballoon.snapshot.qmp_vm import QemuVm

__all__ = ("main",)

CONNECT_SECONDS = 20.0
"""How long the monitor may take to be free after the snapshot has died."""


def main() -> int:
    """Guard; returns 1 when something could not be undone."""
    last = b""
    for line in sys.stdin.buffer:
        if line.endswith(b"\n"):  # one cut short was never acted upon
            last = line
    if not last or json.loads(last)["over"]:
        return 0
    print("vballoon: the snapshot was killed; undoing what it did", file=sys.stderr)
    return _undo(last)


def _undo(line: bytes) -> int:
    from vballoon.errors import UsageError
    from vballoon.snapshot.recovery import Note, go_back

    note = Note.loads(line)
    try:
        with _connect(note.qmp) as vm:
            troubles = go_back(vm, note)
    except UsageError as error:
        troubles = [str(error)]
    for trouble in troubles:
        print(f"vballoon: {trouble}", file=sys.stderr)
    return 1 if troubles else 0


def _connect(path: str) -> QemuVm:
    from vballoon.errors import UsageError
    from vballoon.snapshot.qmp_vm import QemuVm

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
