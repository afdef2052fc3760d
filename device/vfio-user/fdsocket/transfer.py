# SPDX-License-Identifier: Apache-2.0
"""One ``recvmsg`` and one ``sendmsg`` with descriptors, done right."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterable, Sequence

__all__ = ("MAX_FDS", "TruncatedError", "close_fds", "receive_some", "send_some")

MAX_FDS = 253
"""Descriptors that one message can carry (SCM_MAX_FD of the Linux kernel)."""

_INT = array.array("i").itemsize
_CONTROL_SIZE = socket.CMSG_SPACE(MAX_FDS * _INT)


class TruncatedError(OSError):
    """The kernel could not hand over all descriptors (this process has too many open files)."""


def close_fds(fds: Iterable[int]) -> None:
    """Close descriptors; one that is not open is passed over."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass


def receive_some(sock: socket.socket, size: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """At most *size* bytes and the descriptors that came with them; ``b""`` at end of file.

    *flags* are further ones for ``recvmsg``, such as MSG_PEEK.
    The descriptors are the caller's, and close-on-exec.  Raises :class:`BlockingIOError` when
    there is nothing yet, :class:`TruncatedError` when descriptors were lost on the way (those
    that did arrive are closed), and other :class:`OSError` as the socket has it.
    """
    wanted = flags | socket.MSG_CMSG_CLOEXEC
    data, control, flags, _ = sock.recvmsg(size, _CONTROL_SIZE, wanted)
    fds = array.array("i")
    for level, kind, payload in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % _INT])
    if flags & socket.MSG_CTRUNC:
        close_fds(fds)
        raise TruncatedError("descriptors were lost: too many open files in this process")
    return data, list(fds)


def send_some(sock: socket.socket, data: bytes | memoryview, fds: Sequence[int] = ()) -> int:
    """Send what the socket takes of *data*, the descriptors with its first byte.

    Returns the number of bytes sent; *fds* stay the caller's.  Raises :class:`BlockingIOError`
    when the socket takes nothing now, and :class:`ValueError` for more than :data:`MAX_FDS`.
    """
    if len(fds) > MAX_FDS:
        raise ValueError(f"{len(fds)} descriptors in one message, at most {MAX_FDS}")
    control = []
    if fds:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    return sock.sendmsg([data], control, socket.MSG_NOSIGNAL)
