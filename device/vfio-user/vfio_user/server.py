# SPDX-License-Identifier: Apache-2.0
"""The shell: a device on a Unix socket, on asyncio.

One client at a time: a second one is refused with EBUSY, and one that connects after the first
has disconnected finds the device as it was left.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable

import fdsocket
from vfio_user.busy import Refusal, hung_up
from vfio_user.device import PciDevice
from vfio_user.faults import guarded
from vfio_user.link import SessionLimits
from vfio_user.regions import IoEvent
from vfio_user.session import Session

__all__ = ("DMA_TIMEOUT", "Server")

log = logging.getLogger(__name__)

DMA_TIMEOUT = 4.0
"""Seconds for an answer to DMA_READ or DMA_WRITE: less than the five after which QEMU gives up on
a command of its own, so that a client which waits for us gets an answer in time."""

BLOCKED_TIMEOUT = 1.0
"""Seconds that a command may wait for the device's work while that waits for the client."""

GRACE = 0.25
"""Seconds for which a client is held while another one is served, before it is refused."""

_SECONDS = 5.0
"""The same once the other end of that connection is closed: its end is noticed any moment."""

_READ_SIZE = 1 << 16
_REFUSALS_MAX = 16
"""Maximum number of clients that get an error because the device is in use; others are closed."""


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
        self._next: socket.socket | None = None  # waits until the last client's end is noticed
        self._next_due: asyncio.Handle
        self._refusals: list[Refusal] = []
        self._acceptor: fdsocket.Acceptor | None = None
        if fdsocket.is_listening(listener):
            self._acceptor = fdsocket.Acceptor(listener, self._connect, self._not_accepted)
        else:
            self._only = listener
        self._loop: asyncio.AbstractEventLoop | None = None
        self.feeding = False
        """Whether the session takes bytes now; deferred work is done right after that."""
        self._unmask_fd: int | None = None

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
        self.device.irqs.watch_unmask(self._watch_unmask)
        self.device.on_io_event(self._watch_io)
        for region in self.device.regions:
            for event in region.io_events:
                self._watch_io(event, True)
        if self._acceptor is not None:
            self._acceptor.resume()
        elif self._only is not None:
            self._connect(self._only)

    def _wake(self) -> None:
        if self._loop is not None and not self.feeding:
            self._loop.call_soon(self.run_deferred)

    def run_deferred(self) -> None:
        """Do what the device has deferred, serve what waited for it, and send the results."""
        self.device.run_deferred()
        if self.connection is not None:
            self.connection.session.drain()
            self.connection.flush()

    def _watch_io(self, event: IoEvent, added: bool) -> None:
        if self._loop is None:
            return
        if added:
            self._loop.add_reader(event.fd, self._signalled, event.fd, event.callback)
        else:
            self._loop.remove_reader(event.fd)

    def _signalled(self, fd: int, callback: Callable[[], None]) -> None:
        try:
            os.eventfd_read(fd)
        except BlockingIOError:
            return
        guarded("an ioeventfd's callback", callback)
        self.run_deferred()

    def _watch_unmask(self, fd: int | None) -> None:
        if self._loop is None:
            return
        if self._unmask_fd is not None:
            self._loop.remove_reader(self._unmask_fd)
        self._unmask_fd = fd
        if fd is not None:
            self._loop.add_reader(fd, self.device.irqs.unmask_intx)

    def _not_accepted(self, error: OSError) -> None:
        log.error("cannot accept a client: %s", error.strerror)

    def _connect(self, sock: socket.socket) -> None:
        if self.connection is not None:
            self._busy(sock)
            return
        log.info("client connected")
        self.connection = Connection(self, sock)
        self.connection.stream.start()

    def _busy(self, sock: socket.socket) -> None:
        """Hold a client until the present one has gone, for a moment; then refuse it.

        The end of a connection can come after the end of its process: io_uring, which QEMU's
        main loop uses, gives files up later.
        """
        assert self.connection is not None
        assert self._loop is not None
        if self._next is not None:
            self._refuse(sock)
            return
        stream = self.connection.stream
        gone = not stream.is_open or hung_up(stream.fileno())
        self._next = sock
        self._next_due = self._loop.call_later(_SECONDS if gone else GRACE, self._still_busy)

    def _still_busy(self) -> None:
        if self._next is not None:
            sock, self._next = self._next, None
            self._refuse(sock)

    def _refuse(self, sock: socket.socket) -> None:
        self._refusals = [refusal for refusal in self._refusals if refusal.is_open]
        if len(self._refusals) >= _REFUSALS_MAX:
            sock.close()
            return
        log.info("a second client is refused: the device is in use")
        self._refusals.append(Refusal(sock))

    def disconnected(self, error: str | None) -> None:
        """Wait for the next client: the connection, which calls this, has ended."""
        log.info("client disconnected%s", f": {error}" if error else "")
        self.error = error
        self.connection = None
        if self._loop is None:
            return
        if self._acceptor is None:
            self._finished.set()
        elif self._next is not None:
            sock, self._next = self._next, None
            self._next_due.cancel()
            self._connect(sock)

    def close(self) -> None:
        """Close the socket and the connection; the device stays.  Safe to call again."""
        for region in self.device.regions:
            for event in region.io_events:
                self._watch_io(event, False)
        self.device.on_io_event(None)
        self.device.irqs.watch_unmask(None)
        self._watch_unmask(None)
        self._loop = None
        self.device.on_deferred(None)
        for refusal in self._refusals:
            refusal.close()
        if self._next is not None:
            self._next.close()
            self._next_due.cancel()
            self._next = None
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
            server.device,
            limits=server.limits,
            wait=self._wait,
            open_twin=self._open_twin,
            spawn=_spawn,
        )
        self.stream = fdsocket.FdStream(sock, self)
        self._twin: fdsocket.FdStream | None = None
        self._blocked_until = 0.0  # until when a command waits for the device's work; 0: none does

    # -- what the stream asks of its receiver -----------------------------------------------------

    def wanted(self) -> int:
        """Return a buffer's size: the session knows which message descriptors belong to."""
        return _READ_SIZE

    def received(self, data: bytes, fds: list[int]) -> None:
        """Feed the session, send its replies, then do what the device has deferred.

        At once, not from the loop, where a doorbell would wait for all other work.
        """
        self._server.feeding = True
        try:
            self.session.feed(data, fds)
        finally:
            self._server.feeding = False
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
        while not done():
            self.flush()
            if self.session.blocked and not self._blocked_until:
                self._blocked_until = time.monotonic() + BLOCKED_TIMEOUT
            limit = min(deadline, self._blocked_until or deadline)
            try:
                self._receive(limit - time.monotonic())
            except TimeoutError:
                if limit >= deadline:
                    raise
                self.session.cancel_work()
        if not self.session.blocked:
            self._blocked_until = 0.0

    def _receive(self, seconds: float) -> None:
        if seconds <= 0:
            raise TimeoutError
        if self._twin is not None:
            self.session.feed_twin(*self._twin.receive(_READ_SIZE, seconds))
        else:
            self.session.feed(*self.stream.receive(_READ_SIZE, seconds))


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


async def _await(waiting: Awaitable[None]) -> None:
    await waiting


def _spawn(
    waiting: Awaitable[None], done: Callable[[BaseException | None], None]
) -> Callable[[], object]:
    """Run a device's coroutine as a task; see :class:`vfio_user.session.Session`."""
    task = asyncio.ensure_future(_await(waiting))

    def finished(task: asyncio.Task[None]) -> None:
        done(asyncio.CancelledError() if task.cancelled() else task.exception())

    task.add_done_callback(finished)
    return task.cancel
