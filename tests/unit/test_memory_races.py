# SPDX-License-Identifier: Apache-2.0
"""A guest that changes what is being read: what was checked is what is used.

The loops run in a process of their own, so that a wrong store ends that process and not this one;
another one keeps writing to the same guest memory meanwhile.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from tests.fakes.memory import memfd

SIZE = 1 << 20
SECONDS = 0.6

WRITER = """
import mmap, sys
import numpy as np
memory = np.frombuffer(mmap.mmap(int(sys.argv[1]), 0), np.uint64)
good, bad = np.uint64(sys.argv[2]), np.uint64(sys.argv[3])
words = memory[: int(sys.argv[4])]
while True:
    words[1::2] = bad
    words[1::2] = good
"""
READER = """
import sys, time
import numpy as np
from vballoon.memory import GuestMemory, MemoryRegion, gather
from vballoon.skipmap import Provenance, SkipMap
memory = GuestMemory([
    MemoryRegion.map(guest_phys_addr=0, size=1 << 20, file_offset=0, fd=int(sys.argv[1]))
])
skipmap = SkipMap(memory)
addr, counts, numbers = np.zeros(1, np.uint64), np.array([16384]), np.array([256])
end = time.monotonic() + float(sys.argv[3])
seen = set()
while time.monotonic() < end:
    if sys.argv[2] == "records":
        done, pages, bad = skipmap.set_guest_records(Provenance.WALKED, memory, addr, counts, 1)
        seen.add(bad > 0)
        assert bad + pages == 16384 * done, (done, pages, bad)
    else:
        found, bad = gather.page_ranges(memory, addr, numbers)
        seen.add(bad > 0)
        assert not len(found) or found.end[-1] <= 256, found
print(len(seen))
"""

CASES = {
    # what is there, what every second word alternates between, how many words of it
    "records": (np.tile(np.array([0, 1], "<u8"), 16384), 1, 1 << 40, 32768),
    "numbers": (np.full(128, 5 << 32 | 5, "<u8"), 5 << 32 | 5, 0xFFFFFFF0 << 32 | 7, 128),
}


@pytest.mark.parametrize("what", CASES)
def test_each_field_is_fetched_once(what: str) -> None:
    content, good, bad, words = CASES[what]
    fd = memfd(SIZE, 0)  # inherited
    os.pwrite(fd, content.tobytes(), 0)
    os.set_inheritable(fd, True)
    command = [sys.executable, "-c", WRITER, str(fd), str(good), str(bad), str(words)]
    with subprocess.Popen(command, pass_fds=[fd]) as writer:
        try:
            done = subprocess.run(
                [sys.executable, "-c", READER, str(fd), what, str(SECONDS)],
                pass_fds=[fd],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        finally:
            writer.kill()
    os.close(fd)
    assert done.returncode == 0, done.stderr[-2000:]
