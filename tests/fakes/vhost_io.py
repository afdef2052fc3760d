# SPDX-License-Identifier: Apache-2.0
"""An I/O shell for the vhost-user back-end without a loop; the test runs every step."""

from __future__ import annotations

import os
from collections import deque

from fdsocket import close_fds


class Owned:
    """A descriptor that this object owns until ``cancel``."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def cancel(self) -> None:
        fd, self.fd = self.fd, -1
        close_fds([fd] if fd >= 0 else [])

    def fileno(self) -> int:
        return self.fd

    def flush(self) -> None:
        """Do nothing: no output is ever sent."""


class Nothing:
    def cancel(self) -> None:
        """Do nothing: there is nothing to cancel."""


class FakeIo:
    """An implementation of :class:`vballoon.vhost_user.io.Io`; ``run`` runs deferred calls."""

    def __init__(self) -> None:
        self.watched: dict[int, object] = {}
        self.signalled: deque[int] = deque(maxlen=100)
        self.later: deque = deque()

    def run(self, limit: int = 1000) -> None:
        for _ in range(limit):
            if not self.later:
                return
            self.later.popleft()()
        raise AssertionError("the back-end defers work endlessly")

    def watch(self, fd, callback) -> None:
        os.fstat(fd)
        assert fd not in self.watched
        self.watched[fd] = callback

    def unwatch(self, fd) -> None:
        self.watched.pop(fd, None)

    def prepare(self, fd) -> None:
        os.fstat(fd)

    def signal(self, fd) -> None:
        os.fstat(fd)  # it must still be open
        self.signalled.append(fd)

    def soon(self, callback) -> None:
        self.later.append(callback)

    def every(self, seconds, callback):
        return Nothing()

    def open_channel(self, fd, channel):
        return Owned(fd)

    def write_all(self, fd, data, done):
        handle = Owned(fd)
        self.later.append(lambda: handle.fd >= 0 and (handle.cancel(), done("")))
        return handle

    def read_all(self, fd, limit, done):
        handle = Owned(fd)
        self.later.append(lambda: handle.fd >= 0 and (handle.cancel(), done(b"bad", "")))
        return handle

    def output(self) -> None:
        """Do nothing: the test takes the session's output."""
