# SPDX-License-Identifier: Apache-2.0
"""A keeper replaces itself by ``exec``, and passes on its store as systemd would return it."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from typing import NoReturn

from fdsocket import close_fds
from vballoon.keeper.store import Store
from vballoon.keeper.upstream import full_name

__all__ = ("replace",)

_FIRST = 3


def replace(store: Store) -> NoReturn:
    """Run the installed program in this process, with the same arguments and *store*.

    Every other descriptor is closed.  Raise OSError if the program cannot be executed; then every
    descriptor and signal handler of this process is as before.
    """
    kept = [
        (full_name(owner, name), fd) for owner in store.owners() for name, fd in store.of(owner)
    ]
    numbers = range(_FIRST, _FIRST + len(kept))
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, numbers.stop) for _, fd in kept]
    before = {number: _set_aside(number, numbers.stop) for number in numbers}
    for number, fd in zip(numbers, moved, strict=True):
        os.dup2(fd, number, inheritable=True)
    environment = dict(os.environ)
    environment["LISTEN_PID"] = str(os.getpid())
    environment["LISTEN_FDS"] = str(len(kept))
    environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in kept)
    handlers = {  # until the new program handles them
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGUSR2)
    }
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:
        for signal_number, handler in handlers.items():
            signal.signal(signal_number, handler)
        close_fds(moved)
        for number, aside in before.items():
            _put_back(number, aside)
        raise


def _set_aside(number: int, above: int) -> tuple[int, bool] | None:
    """Return a duplicate of *number*, at least *above*, and whether it is inherited; or None."""
    try:
        return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, above), os.get_inheritable(number)
    except OSError:
        return None  # it is not open


def _put_back(number: int, aside: tuple[int, bool] | None) -> None:
    if aside is None:
        os.close(number)
        return
    fd, inheritable = aside
    os.dup2(fd, number, inheritable=inheritable)
    os.close(fd)
