# SPDX-License-Identifier: Apache-2.0
"""A keeper replaces itself by ``exec``, and passes on its store as systemd would return it."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from typing import NoReturn

from vballoon.keeper.store import Store
from vballoon.keeper.upstream import full_name

__all__ = ("replace",)

_FIRST = 3


def replace(store: Store) -> NoReturn:
    """Run the installed program in this process, with the same arguments and *store*.

    Every other descriptor is closed.  Raise OSError if the program cannot be executed.
    """
    kept = [
        (full_name(owner, name), fd) for owner in store.owners() for name, fd in store.of(owner)
    ]
    above = _FIRST + len(kept)
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for _, fd in kept]
    for at, fd in enumerate(moved):
        os.dup2(fd, _FIRST + at, inheritable=True)
    environment = dict(os.environ)
    environment["LISTEN_PID"] = str(os.getpid())
    environment["LISTEN_FDS"] = str(len(kept))
    environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in kept)
    for number in (signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # until the new program handles them
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
