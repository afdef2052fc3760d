# SPDX-License-Identifier: Apache-2.0
"""Track writes to each kind of memory on a kernel that can; run inside a lab guest by a test.

Prints one line of JSON: for each kind, what the tracker says with its checks, what its proof alone
says, and how many of the pages written afterwards are found.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from typing import Any

from vballoon.errors import UsageError
from vballoon.snapshot import tracker
from vballoon.snapshot.process import Process
from vballoon.snapshot.source import RamFile

SIZE = 4 << 20
PAGES = SIZE // 4096
CHILD = """
import ctypes, mmap, sys
fd, size = int(sys.argv[1]), int(sys.argv[2])
with mmap.mmap(fd, size) as mapping:
    for at in range(0, size, 4096):
        mapping[at] = 1
    print(ctypes.addressof(ctypes.c_char.from_buffer(mapping)), flush=True)
    sys.stdin.readline()
    for at in range(0, size, 4096):
        mapping[at] = 2
    print("written", flush=True)
    sys.stdin.readline()
"""


def kinds() -> dict[str, int]:
    """Return a descriptor for each kind of memory."""
    os.makedirs("/tmp/huge", exist_ok=True)
    mount = ctypes.CDLL(None, use_errno=True).mount
    assert mount(b"huge", b"/tmp/huge", b"tmpfs", 0, b"huge=always,size=64m") == 0
    with open("/proc/sys/vm/nr_hugepages", "w") as file:
        file.write("16")
    flags = os.O_RDWR | os.O_CREAT
    return {
        "memfd": os.memfd_create("plain"),
        "tmpfs": os.open("/run/plain", flags),
        "hugetlb": os.memfd_create("huge", os.MFD_HUGETLB),
        "tmpfs huge=always": os.open("/tmp/huge/file", flags),
    }


def one(fd: int) -> dict[str, Any]:
    """Track one child's writes to *fd*."""
    os.ftruncate(fd, SIZE)
    words = [sys.executable, "-c", CHILD, str(fd), str(SIZE)]
    with subprocess.Popen(
        words, pass_fds=(fd,), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin
        assert child.stdout
        try:
            blocks = [(int(child.stdout.readline()), RamFile(fd, SIZE, [], 0))]
            tracking = tracker.SoftDirty(child.pid, blocks)
            tracking.start()
            print(file=child.stdin, flush=True)
            child.stdout.readline()
            [found] = tracking.collect()
            said, pages = "", found.total // 4096
        except UsageError as error:
            said, pages = str(error), 0
        finally:
            child.kill()
    return {"said": said, "found": pages}


def unproved(self: tracker.SoftDirty) -> None:
    self._clear()


def main() -> int:
    found = {}
    with_checks = tracker.backing_objection, Process.page_size_at
    for name, fd in kinds().items():
        found[name] = {"checked": one(fd)}
        tracker.backing_objection = lambda fd: ""
        Process.page_size_at = lambda self, address: 4096  # type: ignore[method-assign]
        found[name]["proved"] = one(fd)
        start, tracker.SoftDirty.start = tracker.SoftDirty.start, unproved  # type: ignore[method-assign]
        found[name]["neither"] = one(fd)
        tracker.SoftDirty.start = start  # type: ignore[method-assign]
        tracker.backing_objection, Process.page_size_at = with_checks  # type: ignore[method-assign]
        os.close(fd)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
