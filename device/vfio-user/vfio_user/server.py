# SPDX-License-Identifier: Apache-2.0
"""The shell: a device on a Unix socket, on asyncio.

One client at a time; another one that connects waits until the first has gone, and then finds the
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
from vfio_user.session import Session, SessionLimits

__all__ = ("DMA_TIMEOUT", "Server")

log = logging.getLogger(__name__)

DMA_TIMEOUT = 4.0
"""Seconds for an answer to DMA_READ or DMA_WRITE: less than the five after which QEMU gives up on
a command of its own, so that a client which waits for us gets an answer in time."""

_READ_SIZE = 1 << 16


class Server:
    """Serves *device* to whoever connects to *listener*, or on a connection that is there already.

    *listener* comes from :func:`fdsocket.listen` or :func:`fdsocket.adopt`; it is taken over.
    """

    def __init__(
        self, device: PciDevice, listener: socket.socket, *, limits: SessionLimits | None = None
    ) -> None:
        self.device = device
        self.limits = limits or SessionLimits()
        self.connection: Connection | None = None
        self.finished = asyncio.Event()
        """Set when the server is closed, or when its only connection has ended."""
        self._only: socket.socket | None = None  # a connection that was there already
        self._acceptor: fdsocket.Acceptor | None = None
        if fdsocket.is_listening(listener):
            self._acceptor = fdsocket.Acceptor(listener, self._connect, self._not_accepted)
        else:
            self._only = listener
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Accept clients from now on, in the running loop."""
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
        """Do what the device has put off, and send what comes of it."""
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

    def disconnected(self, reason: str) -> None:
        """The connection has ended (called by it): wait for the next client."""
        log.info("client gone%s", f": {reason}" if reason else "")
        self.connection = None
        if self._loop is None:
            return
        if self._acceptor is not None:
            self._acceptor.resume()
        else:
            self.finished.set()

    def close(self) -> None:
        """Close the socket and the connection; the device stays."""
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
        self.finished.set()


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
        """A buffer full: the session knows which message descriptors belong to."""
        return _READ_SIZE

    def received(self, data: bytes, fds: list[int]) -> None:
        """Bytes for the session; its replies go out, then what the device has put off is done.

        At once, not from the loop: behind other work there a doorbell would wait for all of it.
        """
        self.session.feed(data, fds)
        self.flush()
        self._server.run_deferred()

    def closed(self, reason: str) -> None:
        """The stream has ended."""
        self.close()
        self._server.disconnected(reason or self.session.closed)

    # ---------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Send what the session has to say; close the connection if it says so."""
        for data, fds in self.session.take_output():
            self.stream.send(data, fds)
        for data, fds in self.session.take_twin_output():
            if self._twin is not None:
                self._twin.send(data, fds)
        if self.session.closed:
            self.stream.close_when_sent()

    def close(self) -> None:
        """Let go of everything that is the client's."""
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
    """Between commands nothing is due on the twin socket, so whatever comes is judged as such."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def wanted(self) -> int:
        return _READ_SIZE

    def received(self, data: bytes, fds: list[int]) -> None:
        self._connection.session.feed_twin(data, fds)
        self._connection.flush()

    def closed(self, reason: str) -> None:
        if not self._connection.session.closed:
            self._connection.session.fail("the twin socket was closed")
            self._connection.flush()


def _signalled(fd: int, callback: Callable[[], None]) -> None:
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return
    callback()
