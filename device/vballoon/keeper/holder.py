# SPDX-License-Identifier: Apache-2.0
"""Who holds a device's socket, and whether another front-end waits for it."""

from __future__ import annotations

import select
import socket
import struct
from pathlib import Path

__all__ = ("WAITING", "name_of", "peer_pid", "waits")

WAITING = b"WAITING"
"""Datagram of the keeper to a worker: another front-end waits for this one to disconnect."""
_UCRED = struct.Struct("iII")


def peer_pid(sock: socket.socket) -> int:
    """Return the process id of the peer of *sock* when it connected; 0 if it is unknown."""
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    except OSError:
        return 0
    return int(_UCRED.unpack(raw)[0])


def name_of(connection: int) -> str:
    """Return the peer of the descriptor *connection* as text, for example ``process 7 (qemu)``."""
    with socket.fromfd(connection, socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        pid = peer_pid(sock)
    try:
        return f"process {pid} ({Path(f'/proc/{pid}/comm').read_text().strip()})"
    except OSError:
        return f"process {pid}"


def waits(listener: int) -> bool:
    """Return whether a connection on the descriptor *listener* waits to be accepted."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))
