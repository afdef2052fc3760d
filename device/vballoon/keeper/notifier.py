# SPDX-License-Identifier: Apache-2.0
"""The service's side of the notification protocol: what a worker sends to its supervisor.

The supervisor is the keeper or systemd; the code is the same.  Descriptors stay the caller's.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence

from fdsocket import close_fds, send_some
from vballoon.keeper.notify import build_barrier, build_remove, build_store

__all__ = ("Notifier", "inherited")

BARRIER_SECONDS = 5.0
"""How long to wait for the supervisor.  Without an answer the service continues without it."""
_FIRST = 3
"""The number of the first inherited descriptor (``SD_LISTEN_FDS_START``)."""


class Notifier:
    """Sends on *sock*, a datagram socket that is connected to the supervisor; owns *sock*."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        sock.settimeout(BARRIER_SECONDS)
        self.sock = sock
        self.alive = True
        """False once the supervisor did not take a datagram or answer a barrier."""

    @classmethod
    def from_environment(cls) -> Notifier | None:
        """Return the notifier to ``NOTIFY_SOCKET``; None without a supervisor."""
        path = os.environ.get("NOTIFY_SOCKET", "")
        if path[:1] not in ("/", "@"):
            return None
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            sock.connect("\0" + path[1:] if path[0] == "@" else path)
        except OSError:
            sock.close()
            return None
        return cls(sock)

    def fileno(self) -> int:
        """Return the socket's number."""
        return self.sock.fileno()

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send one datagram; a supervisor that is gone only clears :attr:`alive`."""
        if not self.alive:
            return
        try:
            send_some(self.sock, data, fds)
        except OSError:
            self.alive = False

    def store(self, name: str, fd: int) -> None:
        """Store *fd* under *name*."""
        self.send(build_store(name), [fd])

    def remove(self, name: str) -> None:
        """Remove all descriptors of this *name* from the store."""
        self.send(build_remove(name))

    def ready(self, status: str = "") -> None:
        """Report that the service is up."""
        self.send(f"READY=1\nSTATUS={status}".encode() if status else b"READY=1")

    def watchdog(self) -> None:
        """Report that the service is alive."""
        self.send(b"WATCHDOG=1")

    def stopping(self) -> None:
        """Report that the service ends because it was asked to."""
        self.send(b"STOPPING=1")

    def barrier(self) -> bool:
        """Wait until everything sent before was handled; return False without an answer."""
        reader, writer = os.pipe()
        try:
            self.send(build_barrier(), [writer])
            os.close(writer)
            writer = -1
            poll = select.poll()
            poll.register(reader, 0)  # POLLHUP is reported without being asked for
            if not poll.poll(int(BARRIER_SECONDS * 1000)):
                self.alive = False
        finally:
            close_fds([fd for fd in (reader, writer) if fd >= 0])
        return self.alive

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()


def inherited(environment: dict[str, str] | None = None) -> list[tuple[str, int]]:
    """Return the names and numbers of the descriptors given at the start (sd_listen_fds(3)).

    The variables are removed, so that no child takes them for its own.
    """
    env: dict[str, str] | os._Environ[str] = os.environ if environment is None else environment
    pid, count = env.pop("LISTEN_PID", ""), env.pop("LISTEN_FDS", "")
    names = env.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    fds = range(_FIRST, _FIRST + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)
    return [(names[i] if i < len(names) else "unknown", fd) for i, fd in enumerate(fds)]
