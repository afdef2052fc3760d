# SPDX-License-Identifier: Apache-2.0
"""Where the sockets come from: a path to listen on, a path to connect to, an inherited number."""

from __future__ import annotations

import errno
import os
import socket
import stat

__all__ = ("AddressInUse", "adopt", "connect", "is_listening", "listen")


class AddressInUse(OSError):
    """The path is taken: by a living server, or by something that is not a socket."""


def listen(path: str | os.PathLike[str], *, backlog: int = 4) -> socket.socket:
    """Return a non-blocking listening socket at *path*.

    A socket file of a dead server is removed first; one that somebody still
    listens on, or a file that is no socket, raises :class:`AddressInUse`.
    """
    remove_stale(path)
    sock = _new()
    try:
        sock.bind(os.fspath(path))
        sock.listen(backlog)
    except OSError:
        sock.close()
        raise
    return sock


def remove_stale(path: str | os.PathLike[str]) -> None:
    """Unlink the socket file at *path* if nobody listens on it; nothing there is fine."""
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise AddressInUse(errno.EADDRINUSE, "exists and is not a socket", os.fspath(path))
    with _new() as probe:
        code = probe.connect_ex(os.fspath(path))
    if code != errno.ECONNREFUSED:  # 0 and EAGAIN: alive; EACCES and the like: not ours to judge
        raise AddressInUse(errno.EADDRINUSE, "another server listens on it", os.fspath(path))
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def connect(path: str | os.PathLike[str]) -> socket.socket:
    """Return a non-blocking socket connected to *path*.  Raise :class:`OSError` without a server.

    Does not block either: a server that accepts nobody is :class:`BlockingIOError`.
    """
    sock = _new()
    try:
        sock.connect(os.fspath(path))
    except OSError:
        sock.close()
        raise
    return sock


def adopt(fd: int) -> socket.socket:
    """Return the Unix stream socket inherited as descriptor *fd*, set to non-blocking.

    The number is taken over.  Raises :class:`OSError` for anything that is not such a socket.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise OSError(error.errno, f"descriptor {fd} is not a socket") from error
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise OSError(errno.EPROTOTYPE, f"descriptor {fd} is not a Unix stream socket")
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


def is_listening(sock: socket.socket) -> bool:
    """Whether connections can be accepted on *sock* (otherwise it is a connection itself)."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _new() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)  # Python makes it close-on-exec
    sock.setblocking(False)
    return sock
