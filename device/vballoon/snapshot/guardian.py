# SPDX-License-Identifier: Apache-2.0
"""The guardian's program: read journal entries until the input ends, then undo the last one.

It starts while a snapshot begins, so it imports what undoing needs only when it has to undo.
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
    """Guard one snapshot. Return 1 if something could not be undone."""
    last = b""
    for line in sys.stdin.buffer:
        if line.endswith(b"\n"):  # an entry that was cut short was never acted upon
            last = line
    if not last or json.loads(last)["over"]:
        return 0
    print("vballoon: the snapshot was killed; undoing what it did", file=sys.stderr)
    return _undo(last)


def _undo(line: bytes) -> int:
    from vballoon.errors import UsageError
    from vballoon.snapshot.journal import Entry
    from vballoon.snapshot.recovery import undo

    entry = Entry.loads(line)
    try:
        with _connect(entry.qmp) as vm:
            troubles = undo(vm, entry)
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
