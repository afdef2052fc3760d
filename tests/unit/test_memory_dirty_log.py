# SPDX-License-Identifier: Apache-2.0
"""The dirty log: no page that was written is left out, whatever the front-end does meanwhile."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.memory import make_memory, memfd

from vballoon.errors import ProtocolError
from vballoon.memory import VHOST_LOG_PAGE, BitmapLog, fence

LOG_BYTES = 64
LOGGED = LOG_BYTES * 8 * VHOST_LOG_PAGE


def pages(log: BitmapLog) -> set[int]:
    """Least significant bit first, as the vhost-user document has it."""
    return {
        8 * i + b for i, byte in enumerate(log.bitmap.tolist()) for b in range(8) if byte >> b & 1
    }


@given(st.integers(0, LOGGED + 100_000), st.integers(0, 100_000))
def test_every_written_page_is_marked(addr: int, length: int) -> None:
    log = BitmapLog(np.zeros(LOG_BYTES, np.uint8))
    log.mark(addr, length)
    written = {a // VHOST_LOG_PAGE for a in range(addr, addr + length, VHOST_LOG_PAGE)}
    if length:
        written.add((addr + length - 1) // VHOST_LOG_PAGE)
    kept = {p for p in written if p < LOG_BYTES * 8}
    found = pages(log)
    assert kept <= found
    # and nothing but the groups of eight pages around them
    assert found == {8 * (p // 8) + i for p in kept for i in range(8)}
    assert log.overruns == bool(written - kept)


def test_a_byte_is_stored_whole_so_nothing_is_read_back() -> None:
    """A read-modify-write could put back a bit, or lose one, that changed between its halves."""
    log = BitmapLog(np.full(LOG_BYTES, 0x10, np.uint8))
    log.mark(0, 1)
    assert log.bitmap[:2].tolist() == [0xFF, 0x10]


def test_a_mapped_log_is_the_file_and_its_descriptor_is_closed() -> None:
    fd = memfd(8192)
    keep = os.dup(fd)
    log = BitmapLog.map(fd, 100, 4097)
    log.mark(99 * 8 * VHOST_LOG_PAGE, 1)
    log.mark(100 * 8 * VHOST_LOG_PAGE, 1)  # past the log: dropped, and never outside the mapping
    data = os.pread(keep, 8192, 0)
    assert [i for i, byte in enumerate(data) if byte] == [4097 + 99]
    assert log.overruns == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    os.close(keep)


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (8193, 0), (1, 8192), (1, -1), (-1, 4096)])
def test_a_bad_log_is_refused_and_its_descriptor_closed(size: int, offset: int) -> None:
    fd = memfd(8192)
    with pytest.raises(ProtocolError, match="log-region"):
        BitmapLog.map(fd, size, offset)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_log_that_is_no_file() -> None:
    with pytest.raises(ProtocolError, match="log-region"):
        BitmapLog.map(9999, 1, 0)


def test_memory_writes_are_marked_only_while_there_is_a_log() -> None:
    memory = make_memory()
    memory.write(0, b"x")
    memory.dirty_log = log = BitmapLog(np.zeros(LOG_BYTES, np.uint8))
    memory.write(3 * 8 * VHOST_LOG_PAGE, b"x")
    memory.dirty_log = None
    memory.write(5 * 8 * VHOST_LOG_PAGE, b"x")
    assert np.flatnonzero(log.bitmap).tolist() == [3]
    memory.close()


# the fence: its effect cannot be seen from one thread, but that it is the right call can


def test_every_kind_of_fence_can_be_made_and_called() -> None:
    for make in (fence.by_lock, fence.by_membarrier):
        call = make()
        call()
        call()
    assert fence.KIND in ("lock", "libatomic", "membarrier")
    fence.full()
    fence.acquire()
    fence.release()


def test_a_lock_is_a_fence_on_x86_64_only() -> None:
    assert fence.choose("x86_64")[0] == "lock"
    for machine in ("aarch64", "riscv64"):
        assert fence.choose(machine)[0] in ("libatomic", "membarrier")
