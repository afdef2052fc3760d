# SPDX-License-Identifier: Apache-2.0
"""Accepting connections in an asyncio loop, also when the process has run out of descriptors."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

__all__ = ("Acceptor",)


class Acceptor:
    """Accepts connections on *listener*, which is taken over, between ``resume`` and ``pause``.

    Each is given to *accepted*.  Where one cannot be accepted (no descriptor left, most likely),
    *failed* is called and it is tried again after :attr:`retry_seconds`: it is still waiting, so
    looking at it again at once would be all that the loop does.
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
        """Let those who connect wait."""
        if self._loop is not None:
            self._loop.remove_reader(self._listener)
        if self._retry is not None:
            self._retry.cancel()
        self._loop = self._retry = None

    def close(self) -> None:
        """Accept nobody any more, and close the listening socket."""
        self.pause()
        self._listener.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # gone again
            return
        except OSError as error:
            loop = self._loop
            self.pause()
            if loop is not None:
                self._retry = loop.call_later(self.retry_seconds, self.resume)
            self._failed(error)
            return
        self._accepted(sock)
