# SPDX-License-Identifier: Apache-2.0
"""The asyncio shell: reads for a receiver, writes in order, and is bounded both ways."""

from __future__ import annotations

import asyncio
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from fdsocket.transfer import MAX_FDS, close_fds, receive_some, send_some

__all__ = ("OUTPUT_LIMIT", "READS_PER_WAKEUP", "FdStream", "Receiver")

OUTPUT_LIMIT = 1 << 20
"""Bytes of output that may wait before reading pauses.

A peer that sends requests and never reads the replies must not make us grow: its next request is
read when it has taken the replies to the earlier ones.  Output that nobody asked for (events) can
pass the limit by as much again; then the connection is given up.
"""

READS_PER_WAKEUP = 32
"""Reads for each time that the socket is found readable, so that one peer cannot hold the loop."""


class Receiver(Protocol):
    """Whom the stream reads for.  The calls come from the loop, never from inside ``send``."""

    def wanted(self) -> int:
        """How many bytes may be read next, at least 1."""

    def received(self, data: bytes, fds: list[int]) -> None:
        """Bytes arrived, and perhaps descriptors, which are the receiver's from now on."""

    def closed(self, error: str | None) -> None:
        """Take note that the connection has ended, and why (None: orderly).  Called once."""


class FdStream:
    """One connection.  See the package's docstring."""

    def __init__(
        self, sock: socket.socket, receiver: Receiver, *, output_limit: int = OUTPUT_LIMIT
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._receiver = receiver
        self._limit = output_limit
        self._loop: asyncio.AbstractEventLoop | None = None
        self._output: deque[tuple[memoryview, list[int]]] = deque()
        self._queued = 0
        self._reading = self._writing = False
        self._open = True
        self._closing = False
        self._told = False
        self.error: str | None = None
        """Why the connection ended; None while it is open, or for an orderly end."""

    @property
    def is_open(self) -> bool:
        """Whether the connection is still open."""
        return self._open

    @property
    def queued(self) -> int:
        """Bytes of output that wait for the peer to read."""
        return self._queued

    def fileno(self) -> int:
        """Return the socket's descriptor number, -1 after :meth:`close`."""
        return self._sock.fileno()

    def start(self) -> None:
        """Read for the receiver from now on, in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._update()

    # -- output -------------------------------------------------------------------------------

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send *data* after everything that was sent before; takes *fds* over.

        Never blocks and never raises for what the peer did: a broken connection is reported by
        ``closed``.  Raises :class:`ValueError` for too many descriptors or for descriptors
        without a byte to carry them.
        """
        if len(fds) > MAX_FDS or (fds and not data):
            close_fds(fds)
            raise ValueError(f"{len(fds)} descriptors with {len(data)} bytes cannot be sent")
        if not self._open or self._closing:
            close_fds(fds)
            return
        if data:
            self._output.append((memoryview(data), list(fds)))
            self._queued += len(data)
            self._flush()
        if self._queued > 2 * self._limit:
            self._end(f"{self._queued} bytes of output that the peer does not read")

    def _flush(self) -> None:
        """Write what the socket takes now."""
        try:
            while self._output:
                data, fds = self._output[0]
                done = send_some(self._sock, data, fds)
                close_fds(fds)
                self._queued -= done
                if done == len(data):
                    self._output.popleft()
                else:
                    self._output[0] = (data[done:], [])
        except BlockingIOError:
            pass
        except OSError as error:
            self._end(_reason(error))
            return
        if self._closing and not self._output:
            self.close()
        self._update()

    def close_when_sent(self) -> None:
        """Read no more, and close once the queued output is written."""
        self._closing = True
        if self._open:
            self._flush()

    # -- input --------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        for _ in range(READS_PER_WAKEUP):
            if not self._reading:  # closed, or paused, by what the receiver did
                return
            try:
                data, fds = receive_some(self._sock, max(1, self._receiver.wanted()))
            except BlockingIOError:
                return
            except OSError as error:
                self._end(_reason(error))
                return
            if not data:
                close_fds(fds)
                self._end(None)
                return
            self._receiver.received(data, fds)

    def receive(self, size: int, timeout: float) -> tuple[bytes, list[int]]:
        """Wait for the next bytes, at most *timeout* seconds; at most *size* of them.

        Blocks the loop.  Output queued before is written first.  The descriptors are the
        caller's.  Raises :class:`TimeoutError`, and :class:`ConnectionError` when the
        connection has ended or ends meanwhile (``closed`` is still called, from the loop).
        """
        deadline = time.monotonic() + timeout
        while True:
            self._flush()
            if not self._open:
                raise ConnectionResetError("the connection has ended")
            if not self._output:
                try:
                    return self._receive_now(size)
                except BlockingIOError:
                    pass
            self._wait(select.POLLOUT if self._output else select.POLLIN, deadline)

    def _receive_now(self, size: int) -> tuple[bytes, list[int]]:
        try:
            data, fds = receive_some(self._sock, size)
        except BlockingIOError:
            raise
        except OSError as error:
            self._end(_reason(error))
            raise ConnectionResetError(_reason(error)) from error
        if not data:
            close_fds(fds)
            self._end(None)
            raise ConnectionResetError("the peer closed the connection")
        return data, fds

    def _wait(self, events: int, deadline: float) -> None:
        left = deadline - time.monotonic()
        poll = select.poll()
        poll.register(self._sock, events)
        if left <= 0 or not poll.poll(max(1, int(left * 1000))):
            raise TimeoutError("no answer in time")

    # -- end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the socket and everything that waits to be sent; safe to call again."""
        self._end(None)

    def _end(self, error: str | None) -> None:
        if self._open:
            self._open = False
            self._update()
            for _, fds in self._output:
                close_fds(fds)
            self._output.clear()
            self._queued = 0
            self._sock.close()
        if not self._told:
            self._told = True
            self.error = error
            if self._loop is not None:
                self._loop.call_soon(self._receiver.closed, error)
            else:
                self._receiver.closed(error)

    def _update(self) -> None:
        """Watch the socket for what is wanted of it now."""
        if self._loop is None:
            return
        reading = self._open and not self._closing and self._queued <= self._limit
        writing = self._open and bool(self._output)
        if reading != self._reading:
            self._reading = reading
            if reading:
                self._loop.add_reader(self._sock, self._on_readable)
            else:
                self._loop.remove_reader(self._sock)
        if writing != self._writing:
            self._writing = writing
            if writing:
                self._loop.add_writer(self._sock, self._flush)
            else:
                self._loop.remove_writer(self._sock)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
