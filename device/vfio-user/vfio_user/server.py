# SPDX-License-Identifier: Apache-2.0
"""The shell: a device on a Unix socket, on asyncio.

One client at a time; the next one waits until the first has disconnected, and then finds the
device as it was left.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable

import fdsocket
from vfio_user.device import PciDevice
from vfio_user.link import SessionLimits
from vfio_user.session import Session

__all__ = ("DMA_TIMEOUT", "Server")

log = logging.getLogger(__name__)

DMA_TIMEOUT = 4.0
"""Seconds for an answer to DMA_READ or DMA_WRITE: less than the five after which QEMU gives up on
a command of its own, so that a client which waits for us gets an answer in time."""

_READ_SIZE = 1 << 16


class Server:
    """Serves *device* to whoever connects to *listener*, or on a connection that exists already.

    *listener* comes from :func:`fdsocket.listen` or :func:`fdsocket.adopt`; it is taken over.
    """

    def __init__(
        self, device: PciDevice, listener: socket.socket, *, limits: SessionLimits | None = None
    ) -> None:
        self.device = device
        self.limits = limits or SessionLimits()
        self.connection: Connection | None = None
        self.error: str | None = None
        """Why the last connection ended; None for an orderly end."""
        self._finished = asyncio.Event()
        self._only: socket.socket | None = None  # a connection that exists already
        self._acceptor: fdsocket.Acceptor | None = None
        if fdsocket.is_listening(listener):
            self._acceptor = fdsocket.Acceptor(listener, self._connect, self._not_accepted)
        else:
            self._only = listener
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self) -> None:
        """Serve clients until :meth:`close`; on an inherited connection, until it has ended."""
        if not self._finished.is_set():
            self._start()
        try:
            await self._finished.wait()
        finally:
            self.close()

    def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.device.on_deferred(self._wake)
        for region in self.device.regions:
            for event in region.io_events:
                self._loop.add_reader(event.fd, _signalled, event.fd, event.callback)
        if self._acceptor is not None:
            self._acceptor.resume()
        elif self._only is not None:
            self._connect(self._only)

    def _wake(self) -> None:
        if self._loop is not None:
            self._loop.call_soon(self.run_deferred)

    def run_deferred(self) -> None:
        """Do what the device has deferred, and send what results."""
        self.device.run_deferred()
        if self.connection is not None:
            self.connection.flush()

    def _not_accepted(self, error: OSError) -> None:
        log.error("cannot accept a client: %s", error.strerror)

    def _connect(self, sock: socket.socket) -> None:
        if self._acceptor is not None:
            self._acceptor.pause()
        log.info("client connected")
        self.connection = Connection(self, sock)
        self.connection.stream.start()

    def disconnected(self, error: str | None) -> None:
        """Wait for the next client: the connection, which calls this, has ended."""
        log.info("client disconnected%s", f": {error}" if error else "")
        self.error = error
        self.connection = None
        if self._loop is None:
            return
        if self._acceptor is not None:
            self._acceptor.resume()
        else:
            self._finished.set()

    def close(self) -> None:
        """Close the socket and the connection; the device stays.  Safe to call again."""
        if self._loop is not None:
            for region in self.device.regions:
                for event in region.io_events:
                    self._loop.remove_reader(event.fd)
        self._loop = None
        self.device.on_deferred(None)
        if self.connection is not None:
            self.connection.close()
        if self._acceptor is not None:
            self._acceptor.close()
        self._finished.set()


class Connection:
    """One client: the session, its stream, and the twin socket if there is one."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self._server = server
        self.session = Session(
            server.device, limits=server.limits, wait=self._wait, open_twin=self._open_twin
        )
        self.stream = fdsocket.FdStream(sock, self)
        self._twin: fdsocket.FdStream | None = None

    # -- what the stream asks of its receiver -----------------------------------------------------

    def wanted(self) -> int:
        """Return a buffer's size: the session knows which message descriptors belong to."""
        return _READ_SIZE

    def received(self, data: bytes, fds: list[int]) -> None:
        """Feed the session, send its replies, then do what the device has deferred.

        At once, not from the loop, where a doorbell would wait for all other work.
        """
        self.session.feed(data, fds)
        self.flush()
        self._server.run_deferred()

    def closed(self, error: str | None) -> None:
        """Release everything of the client: the stream has ended."""
        self.session.receive_eof(error)
        self.close()
        self._server.disconnected(self.session.error)

    # ---------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Send what the session has to send; close the connection if the session has ended."""
        for data, fds in self.session.take_output():
            self.stream.send(data, fds)
        for data, fds in self.session.take_twin_output():
            if self._twin is not None:
                self._twin.send(data, fds)
        if not self.session.is_open:
            self.stream.close_when_sent()

    def close(self) -> None:
        """Release everything of the client."""
        self.session.receive_eof()
        self.stream.close()
        if self._twin is not None:
            self._twin.close()

    def _open_twin(self) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._twin = fdsocket.FdStream(ours, _TwinReceiver(self))
        self._twin.start()
        return theirs.detach()

    def _wait(self, done: Callable[[], bool]) -> None:
        """Exchange messages until *done*; see :class:`vfio_user.session.Session`."""
        deadline = time.monotonic() + DMA_TIMEOUT
        twin = self._twin
        while not done():
            self.flush()
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if twin is not None:
                data, fds = twin.receive(_READ_SIZE, left)
                self.session.feed_twin(data, fds)
            else:
                data, fds = self.stream.receive(_READ_SIZE, left)
                self.session.feed(data, fds)


class _TwinReceiver:
    """Feeds what arrives between commands, when nothing is expected on the twin socket."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def wanted(self) -> int:
        return _READ_SIZE

    def received(self, data: bytes, fds: list[int]) -> None:
        self._connection.session.feed_twin(data, fds)
        self._connection.flush()

    def closed(self, error: str | None) -> None:
        if self._connection.session.is_open:
            self._connection.session.close("the twin socket was closed")
            self._connection.flush()


def _signalled(fd: int, callback: Callable[[], None]) -> None:
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return
    callback()
