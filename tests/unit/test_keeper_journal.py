# SPDX-License-Identifier: Apache-2.0
"""The journal: a record is valid or not, whatever happens to the writer or to the bytes."""

from __future__ import annotations

import fcntl
import os
import random
import signal
from typing import NamedTuple

import pytest

from vballoon.keeper import fault
from vballoon.keeper.journal import RECORD_MAX, RECORD_SIZE, Journal, JournalError


class Found(NamedTuple):
    sequence: int
    content: bytes | None


def reopened(journal):
    """Return what another process reads, over a new open file of the same memfd."""
    fd = os.open(f"/proc/self/fd/{journal.fd}", os.O_RDWR)
    try:
        found = Journal(fd, 1)
        return Found(found.sequence, found.content)
    finally:
        os.close(fd)


def test_the_newest_record_is_found():
    journal = Journal.create(1)
    assert (journal.sequence, journal.content) == (0, None)
    for number in range(5):
        journal.write(b"%d" % number)
        found = reopened(journal)
        assert (found.sequence, found.content) == (number + 1, b"%d" % number)
    journal.close()


def test_its_size_cannot_change():
    journal = Journal.create(1)
    with pytest.raises(PermissionError):
        os.ftruncate(journal.fd, 0)
    with pytest.raises(JournalError):
        journal.write(bytes(RECORD_MAX + 1))
    journal.write(bytes(RECORD_MAX))
    journal.close()


def test_a_torn_record_leaves_the_older_one():
    """Whatever prefix of the newest record was written: the old one or the new one, no third."""
    journal = Journal.create(1)
    old, new = b"old" * 40, b"new" * 50
    journal.write(old)
    before = os.pread(journal.fd, 300, 0)
    journal.write(new)
    after = os.pread(journal.fd, 300, 0)
    assert before != after
    for cut in range(len(after) + 1):
        os.pwrite(journal.fd, after[:cut] + before[cut:], 0)
        found = reopened(journal)
        whole = (after[:cut] + before[cut:]) == after
        assert (found.sequence, found.content) == ((2, new) if whole else (1, old)), cut
    journal.close()


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bits_are_noticed(seed):
    journal = Journal.create(1)
    journal.write(b"one")
    journal.write(b"two" * 10)
    good = os.pread(journal.fd, 60, 0)
    for _ in range(200):
        at = random.Random(seed).randrange(len(good) * 8)
        seed += 1000
        bad = bytearray(good)
        bad[at // 8] ^= 1 << at % 8
        os.pwrite(journal.fd, bad, 0)
        try:
            found = reopened(journal)
        except JournalError:
            continue
        assert found.content in (b"one", b"two" * 10)
        assert found.content == b"one" or at >= 8 * (28 + 30), "a changed record passed"
    journal.close()


def test_noise_is_no_journal():
    journal = Journal.create(1)
    os.pwrite(journal.fd, random.Random(1).randbytes(2 * RECORD_SIZE), 0)
    assert reopened(journal).content is None
    fd = os.memfd_create("short")
    with pytest.raises(JournalError):
        Journal(fd, 1)
    os.close(fd)
    journal.close()


def test_another_version_is_refused():
    journal = Journal.create(7)
    journal.write(b"from the future")
    with pytest.raises(JournalError, match="version 7"):
        reopened(journal)
    journal.close()


def test_one_worker_at_a_time_until_it_dies():
    """The lock is the process's: it goes with it, although the parent still holds the file."""
    journal = Journal.create(1)
    fd = os.dup(journal.fd)
    reader, writer = os.pipe()
    os.close(journal.fd)  # this process's lock
    pid = os.fork()
    if not pid:
        try:
            Journal(fd, 1)
            os.write(writer, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.read(reader, 1)
    with pytest.raises(JournalError, match="another worker"):
        Journal(fd, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    Journal(fd, 1).close()
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("step", ["journal-begin", "journal-first", "journal-written"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_killed_at_every_step(step, count):
    journal = Journal.create(1)
    pid = os.fork()
    if not pid:
        try:
            fault.arm(f"{step}:{count}")
            for number in range(count):
                journal.write(b"%d" % number * 1000)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    done = count if step == "journal-written" else count - 1
    found = reopened(journal)
    assert found.sequence == done
    assert found.content == (b"%d" % (done - 1) * 1000 if done else None)
    journal.close()
