# SPDX-License-Identifier: Apache-2.0
"""Exclude two snapshots of one VM at the same time, also through different monitors."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from vballoon.errors import UsageError

if TYPE_CHECKING:
    from vballoon.snapshot.process import Process

__all__ = ("lock_vm",)


def lock_vm(process: Process, memory: tuple[int, int]) -> int:
    """Lock the VM of *process* by its memory file (device, inode). Return a descriptor.

    The lock is an flock on an open file description of our own.  It lasts until every process that
    has inherited the descriptor has closed it or has ended.  Raise
    :class:`~vballoon.errors.UsageError` where another process has the lock.
    """
    fd = process.open_file(memory)
    if fd is None:
        raise UsageError(f"process {process.pid} does not have the guest's memory open")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise UsageError(
            "another snapshot of this VM is running, or its guardian is undoing one; try again "
            "when it has ended"
        ) from None
    except OSError as error:
        os.close(fd)
        raise UsageError(f"cannot lock the guest's memory file: {error.strerror}") from None
    return fd
