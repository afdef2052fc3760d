# SPDX-License-Identifier: Apache-2.0
"""Accepting connections in an asyncio loop, also when the process has run out of descriptors."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

__all__ = ("Acceptor",)


class Acceptor:
    """Accepts connections on *listener* between ``resume`` and ``pause``; closes it in ``close``.

    Call *accepted* with each connection.  If accepting fails (most likely because no descriptor is
    left), call *failed* and retry after :attr:`retry_seconds`.  The connection is still pending,
    so retrying at once would busy-loop.
    """

    retry_seconds = 0.5

    def __init__(
        self,
        listener: socket.socket,
        accepted: Callable[[socket.socket], None],
        failed: Callable[[OSError], None],
    ) -> None:
        self._listener = listener
        self._accepted, self._failed = accepted, failed
        self._loop: asyncio.AbstractEventLoop | None = None  # while it accepts
        self._retry: asyncio.TimerHandle | None = None

    def resume(self) -> None:
        """Accept connections from now on, in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._listener, self._accept)

    def pause(self) -> None:
        """Stop accepting.  New connections stay in the listen queue of the kernel."""
        if self._loop is not None:
            self._loop.remove_reader(self._listener)
        if self._retry is not None:
            self._retry.cancel()
        self._loop = self._retry = None

    def close(self) -> None:
        """Stop accepting and close the listening socket."""
        self.pause()
        self._listener.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # the peer closed it first
            return
        except OSError as error:
            loop = self._loop
            self.pause()
            if loop is not None:
                self._retry = loop.call_later(self.retry_seconds, self.resume)
            self._failed(error)
            return
        self._accepted(sock)
