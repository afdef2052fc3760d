# SPDX-License-Identifier: Apache-2.0
"""A socket that carries descriptors, has a time limit, and logs its messages."""

from __future__ import annotations

import array
import os
import socket
import struct
import time
from collections.abc import Sequence

from virtio_conformance.findings import Closed, Hang
from virtio_conformance.transcript import Transcript

__all__ = ("Tap", "connect", "peer_pid")

MAX_FDS = 253
"""Linux carries no more descriptors in one message (SCM_MAX_FD)."""


def connect(path: str, limit: float = 5.0) -> socket.socket:
    """Return a connection to a Unix socket; wait for the socket.  Raise Hang after *limit* s."""
    deadline = time.monotonic() + limit
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            if time.monotonic() > deadline:
                raise Hang(f"no program listens on the socket within {limit} s") from None
            time.sleep(0.02)
        else:
            return sock


def peer_pid(sock: socket.socket) -> int:
    """Return the id of the process that listens at the other end."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", raw)[0])


class Tap:
    """A stream socket with descriptors; ``log`` has a line for each message."""

    def __init__(self, sock: socket.socket, limit: float = 2.0, first: float = 0.0) -> None:
        self.sock = sock
        self.limit = limit
        self.first = first
        """Time limit for the first byte if it exceeds *limit*: the program may still start."""
        self.log = Transcript()
        self.closed = False

    def note(self, line: str) -> None:
        """Add a line to the log."""
        self.log.add(line)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send all of *data*, descriptors with its first byte."""
        self.sock.settimeout(self.limit)
        try:
            sent = socket.send_fds(self.sock, [data], list(fds)) if fds else self.sock.send(data)
            while sent < len(data):
                sent += self.sock.send(data[sent:])
        except TimeoutError:
            raise Hang(f"the back-end reads nothing for {self.limit} s") from None
        except (BrokenPipeError, ConnectionResetError):
            self.closed = True
            raise Closed("the connection was closed while sending") from None

    def receive(self, size: int, limit: float | None = None) -> tuple[bytes, list[int]]:
        """Return exactly *size* bytes and the descriptors that came with them."""
        data, fds = b"", list[int]()
        deadline = time.monotonic() + (max(self.limit, self.first) if limit is None else limit)
        while len(data) < size:
            try:
                part, more = self._once(size - len(data), deadline)
            except (Hang, Closed):
                self._drop(fds)
                raise
            data += part
            fds += more
        return data, fds

    def _once(self, size: int, deadline: float) -> tuple[bytes, list[int]]:
        left = deadline - time.monotonic()
        self.sock.settimeout(max(left, 0.001))
        try:
            part, ancillary, _, _ = self.sock.recvmsg(size, socket.CMSG_SPACE(4 * MAX_FDS))
        except TimeoutError:
            raise Hang("no answer within the time limit") from None
        except ConnectionResetError:
            part, ancillary = b"", []
        if not part:
            self.closed = True
            raise Closed("the back-end closed the connection")
        self.first = 0.0
        return part, _descriptors(ancillary)

    def _drop(self, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)

    def silent(self, seconds: float) -> bool:
        """Return whether nothing at all (not even an end of file) comes for *seconds*."""
        self.sock.settimeout(seconds)
        try:
            return not self.sock.recv(1, socket.MSG_PEEK) and self._ended()
        except TimeoutError:
            return True
        except ConnectionResetError:
            return self._ended()

    def _ended(self) -> bool:
        self.closed = True
        return False

    def wait_closed(self, limit: float = 1.0) -> bool:
        """Return whether the connection is closed within *limit* seconds; discard all input."""
        deadline = time.monotonic() + limit
        while not self.closed:
            try:
                _, fds = self._once(65536, deadline)
                self._drop(fds)
            except Closed:
                return True
            except Hang:
                return False
        return True

    def close(self) -> None:
        """Close our end."""
        self.closed = True
        self.sock.close()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % 4])
    return list(found)
