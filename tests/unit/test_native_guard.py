# SPDX-License-Identifier: Apache-2.0
"""vballoon.native.guard: SIGBUS and blocking eventfds, in processes that they would end or stop."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from vballoon.native import guard

FULL = (1 << 64) - 2
"""The highest count of an eventfd; adding to it blocks a writer."""

PRELUDE = """
import mmap, os
import numpy as np
from vballoon.native import guard
def mapped(pages, page=4096, flags=0):
    fd = os.memfd_create("ram", flags)
    os.ftruncate(fd, pages * page)
    return fd, np.frombuffer(mmap.mmap(fd, pages * page), np.uint8)
"""


def run(text: str) -> subprocess.CompletedProcess[str]:
    script = PRELUDE + textwrap.dedent(text)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )


def test_without_the_handler_a_truncated_file_ends_the_process():
    done = run("fd, view = mapped(2); os.ftruncate(fd, 0); view[0]")
    assert done.returncode == -signal.SIGBUS


def test_a_truncated_file_reads_as_zeroes_and_is_counted():
    done = run(
        """
        guard.install()
        fd, view = mapped(4)
        view[:] = 7
        guard.watch(view)
        os.ftruncate(fd, 4096)
        assert guard.faults() == 0
        assert (view[0], view[4096], view[4097]) == (7, 0, 0)
        assert guard.faults() == 1
        view[8192:] = 1
        assert guard.faults() == 3
        """
    )
    assert done.returncode == 0, done.stderr


def test_many_faults_do_not_use_up_the_kernel_mappings():
    done = run(
        """
        guard.install()
        fd, view = mapped(1 << 14)
        guard.watch(view)
        os.ftruncate(fd, 0)
        before = len(open("/proc/self/maps").readlines())
        view[::8192] = 1  # every second page, so that no two mappings could be merged
        assert 64 < guard.faults() < 70, guard.faults()
        assert len(open("/proc/self/maps").readlines()) < before + 140
        """
    )
    assert done.returncode == 0, done.stderr


def test_an_unwatched_mapping_still_ends_the_process():
    done = run(
        """
        guard.install()
        fd, view = mapped(1)
        guard.watch(view)
        other, unwatched = mapped(1)
        os.ftruncate(other, 0)
        unwatched[0]
        """
    )
    assert done.returncode == -signal.SIGBUS


def test_a_mapping_that_has_gone_is_watched_no_longer():
    done = run(
        """
        guard.install()
        for _ in range(70000):  # more than there are slots
            fd, view = mapped(1)
            guard.watch(view)
            os.close(fd)
            del view
        """
    )
    assert done.returncode == 0, done.stderr


def test_a_signal_sent_by_kill_still_ends_the_process():
    done = run("import signal; guard.install(); os.kill(os.getpid(), signal.SIGBUS); print('on')")
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "")


@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK])
def test_a_full_eventfd_does_not_block(flags):
    event = os.eventfd(0, flags)
    try:
        assert guard.signal(event) == 0
        assert os.eventfd_read(event) == 1
        os.eventfd_write(event, FULL)
        assert [guard.signal(event) for _ in range(3)] == [0, 0, 0]
        assert os.eventfd_read(event) == FULL + 1
        assert [guard.signal(event) for _ in range(1000)] == [0] * 1000
        assert os.eventfd_read(event) == 1000
    finally:
        os.close(event)


def test_what_is_no_eventfd_is_refused():
    ours, theirs = os.pipe()
    try:
        assert guard.signal(theirs) == errno.EINVAL
    finally:
        os.close(ours)
        os.close(theirs)
    assert guard.signal(theirs) == errno.EBADF


def test_a_forked_child_can_signal():
    event = os.eventfd(0)
    assert guard.signal(event) == 0
    child = os.fork()
    if child == 0:
        os._exit(guard.signal(event))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.eventfd_read(event) == 2
    os.close(event)


HELD = """
        import fcntl, os
        from vballoon.errors import ProtocolError
        from vballoon.memory import BitmapLog, MemoryRegion
        from vballoon.vhost_user.inflight import InflightArea
        guard.install()
        fd = os.memfd_create("front-end", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 1 << 16)
"""


def test_guest_memory_that_the_front_end_truncates_is_survived():
    done = run(
        HELD
        + """
        region = MemoryRegion.map(guest_phys_addr=0, size=1 << 16, file_offset=0, fd=os.dup(fd))
        os.ftruncate(fd, 0)
        assert region.view.sum() == 0
        assert guard.faults() == 16
        """
    )
    assert done.returncode == 0, done.stderr


def test_a_dirty_log_that_the_front_end_truncates_is_survived():
    done = run(
        HELD
        + """
        log = BitmapLog.map(os.dup(fd), 1 << 16, 0)
        os.ftruncate(fd, 0)
        log.mark(0, 1 << 20)
        assert guard.faults() == 1
        """
    )
    assert done.returncode == 0, done.stderr


def test_an_in_flight_area_that_the_front_end_truncates_is_survived():
    done = run(
        HELD
        + """
        area = InflightArea(os.dup(fd), 1 << 16, 0, 1, 128)
        os.ftruncate(fd, 0)
        assert area._bytes.sum() == 0
        assert guard.faults() == 16
        """
    )
    assert done.returncode == 0, done.stderr


def test_the_in_flight_area_that_is_handed_out_keeps_its_size():
    done = run(
        HELD
        + """
        area = InflightArea.create(2, 128)
        for size in (0, 1 << 30):
            try:
                os.ftruncate(area.fd, size)
            except PermissionError:
                continue
            print("resized")
        """
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
