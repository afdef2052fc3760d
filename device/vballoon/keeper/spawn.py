# SPDX-License-Identifier: Apache-2.0
"""Between the keeper and the warm parent: "start this worker", "it has this number", "it ended".

One JSON object in one packet, with descriptors; what does not fit into one packet follows in more.
Both ends are processes of ours, and neither carries anything that a guest or a front-end wrote.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fdsocket import receive_some, send_some

__all__ = ("PACKET_MAX", "Start", "receive", "send", "send_start")

PACKET_MAX = 1 << 16
_FDS_EACH = 250


@dataclass(frozen=True, slots=True)
class Start:
    """What a worker must know: its machine, and the names of its descriptors in order."""

    name: str
    options: dict[str, Any]
    names: list[str] = field(default_factory=list)
    log_level: str = "info"
    sandbox: str = "on"
    quiet: bool = False
    """Answer messages, but serve no ring: the workers before this one kept crashing."""


def send(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one packet.  Raise OSError if the other end is gone."""
    send_some(sock, json.dumps(message).encode(), fds)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next packet and its descriptors; None when the other end has closed."""
    try:
        data, fds = receive_some(sock, PACKET_MAX)
    except ConnectionResetError:
        return None
    if not data:
        return None
    message: dict[str, Any] = json.loads(data)
    return message, fds


def send_start(sock: socket.socket, start: Start, fds: Iterable[int]) -> None:
    """Ask for a worker; the first of *fds* is its notify socket, the others are named."""
    fds = list(fds)
    message = asdict(start) | {"fds": len(fds)}
    send(sock, {"start": message}, fds[:_FDS_EACH])
    for at in range(_FDS_EACH, len(fds), _FDS_EACH):
        send(sock, {"more": True}, fds[at : at + _FDS_EACH])
