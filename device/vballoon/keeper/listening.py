# SPDX-License-Identifier: Apache-2.0
"""Sockets that listen before anything else is loaded.

Whoever starts the server and then QEMU need not wait for NumPy: a connection made meanwhile waits
in the socket's queue.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack, suppress

import fdsocket
from vballoon.errors import UsageError

__all__ = ("Listening",)


class Listening:
    """The listening sockets of this process by path; the files go when it is closed."""

    def __init__(self) -> None:
        self._sockets: dict[str, socket.socket] = {}
        self._files: list[tuple[str, int]] = []
        self._adopted: set[str] = set()

    def open(self, path: str, *, private: bool = False) -> None:
        """Listen at *path*, for this user alone if *private*.  Raise UsageError."""
        if path in self._adopted:
            self._adopted.remove(path)
            return
        if path in self._sockets:
            raise UsageError(f"{path}: named twice")
        try:
            with ExitStack() as undo:
                if private:
                    undo.callback(os.umask, os.umask(0o177))
                self._sockets[path] = fdsocket.listen(path, backlog=64)
            self._files.append((path, os.stat(path).st_ino))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror or error}") from None

    def adopt(self, sock: socket.socket) -> None:
        """Use *sock*, which listens already, when its path is opened; close one of no path."""
        path = sock.getsockname()
        if isinstance(path, str) and path and path not in self._sockets:
            self._sockets[path] = sock
            self._adopted.add(path)
            with suppress(OSError):
                self._files.append((path, os.stat(path).st_ino))
        else:
            sock.close()

    def keep_files(self) -> None:
        """Leave the socket files to the next process."""
        self._files.clear()

    def take(self, path: str) -> socket.socket:
        """Return the socket that listens at *path*; the caller owns it from now on."""
        return self._sockets.pop(path)

    def close(self) -> None:
        """Close what nobody took, and remove the files, but not those of another server."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()
        for path, inode in self._files:
            try:
                if os.stat(path).st_ino == inode:
                    os.unlink(path)
            except OSError:
                pass
        self._files.clear()
