# SPDX-License-Identifier: Apache-2.0
"""The asyncio shell of one front-end's connection: sockets, event descriptors, pipes, timers.

The back-end decides; this file only does the I/O that :class:`~vballoon.vhost_user.io.Io` asks
for.  Everything a front-end hands over is used without blocking.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable, Sequence
from typing import Protocol

import fdsocket
from fdsocket import FdStream, Receiver, close_fds
from vballoon.errors import ProtocolError
from vballoon.native import guard
from vballoon.vhost_user.backend import VhostUserBackend
from vballoon.vhost_user.channel import BackendChannel

__all__ = ("Connection", "Stream")

log = logging.getLogger(__name__)

_CHUNK = 1 << 16


class Stream(Protocol):
    """The connection's socket: :class:`fdsocket.FdStream`, or one that survives this process."""

    def start(self) -> None:
        """Read for the receiver from now on."""

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send *data*; takes *fds* over."""

    def close_when_sent(self) -> None:
        """Read no more, and close once the output is written."""

    def close(self) -> None:
        """Close the socket."""


class Connection:
    """A connected front-end.  *make_backend* gets this shell and returns its back-end."""

    def __init__(
        self,
        sock: socket.socket,
        make_backend: Callable[[Connection], VhostUserBackend],
        make_stream: Callable[[socket.socket, Receiver], Stream] = FdStream,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._watched: set[int] = set()
        self.ended: asyncio.Future[str] = self._loop.create_future()
        self.stream = make_stream(sock, self)
        self.backend = make_backend(self)
        self.stream.start()

    # -- Receiver of the main socket ----------------------------------------------------------

    def wanted(self) -> int:
        """See :class:`fdsocket.Receiver`."""
        return self.backend.session.wanted()

    def received(self, data: bytes, fds: list[int]) -> None:
        """See :class:`fdsocket.Receiver`."""
        self.backend.session.feed(data, fds)
        self.output()

    def waiting(self) -> bool:
        """Return whether an answer is due that is not known yet."""
        return self.backend.session.waiting

    def output(self) -> None:
        """Send what the session has to send, and end the connection if the session has ended."""
        for data, fds in self.backend.session.take_output():
            self.stream.send(data, fds)
        if not self.backend.session.is_open:
            self.stream.close_when_sent()

    def closed(self, error: str | None) -> None:
        """See :class:`fdsocket.Receiver`."""
        session = self.backend.session
        if error is None:
            session.receive_eof()
        reason = str(session.error or error or "")
        self.backend.close()
        for fd in list(self._watched):
            self.unwatch(fd)
        if not self.ended.done():
            self.ended.set_result(reason)

    def close(self) -> None:
        """End the connection from our side."""
        self.stream.close()

    # -- event descriptors --------------------------------------------------------------------

    def prepare(self, fd: int) -> None:
        """See :class:`~vballoon.vhost_user.io.Io`."""
        if stat.S_IFMT(os.fstat(fd).st_mode) not in (0, stat.S_IFIFO, stat.S_IFSOCK):
            # An eventfd has no file type; a pipe may replace it.  Anything else would grow,
            # block or be always readable.
            raise OSError(errno.EINVAL, "not an eventfd or a pipe")
        os.set_blocking(fd, False)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """See :class:`~vballoon.vhost_user.io.Io`."""
        self.prepare(fd)
        self._loop.add_reader(fd, self._kicked, fd, callback)
        self._watched.add(fd)

    def unwatch(self, fd: int) -> None:
        """See :class:`~vballoon.vhost_user.io.Io`."""
        if fd in self._watched:
            self._watched.discard(fd)
            self._loop.remove_reader(fd)

    def _kicked(self, fd: int, callback: Callable[[], None]) -> None:
        try:
            if not os.read(fd, 8):
                raise OSError(errno.EPIPE, "the other end was closed")
        except BlockingIOError:
            return  # somebody else read it
        except OSError as error:
            log.warning("kick eventfd failed; no longer watched: %s", error.strerror)
            self.unwatch(fd)
            return
        callback()

    def signal(self, fd: int) -> None:
        """See :class:`~vballoon.vhost_user.io.Io`."""
        error = guard.signal(fd)
        if error:
            log.debug("signal lost: %s", os.strerror(error))

    # -- the loop -----------------------------------------------------------------------------

    def soon(self, callback: Callable[[], None]) -> None:
        """See :class:`~vballoon.vhost_user.io.Io`."""
        self._loop.call_soon(callback)

    def every(self, seconds: float, callback: Callable[[], None]) -> _Timer:
        """See :class:`~vballoon.vhost_user.io.Io`."""
        return _Timer(self._loop, seconds, callback)

    # -- more descriptors ---------------------------------------------------------------------

    def open_channel(self, fd: int, channel: BackendChannel) -> _Channel:
        """See :class:`~vballoon.vhost_user.io.Io`."""
        try:
            sock = fdsocket.adopt(fd)
        except OSError:
            close_fds([fd])
            raise
        return _Channel(sock, channel)

    def write_all(self, fd: int, data: bytes, done: Callable[[str], None]) -> _Writer:
        """See :class:`~vballoon.vhost_user.io.Io`."""
        return _Writer(self._loop, fd, data, done)

    def read_all(self, fd: int, limit: int, done: Callable[[bytes, str], None]) -> _Reader:
        """See :class:`~vballoon.vhost_user.io.Io`."""
        return _Reader(self._loop, fd, limit, done)


class _Timer:
    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, callback: Callable[[], None]
    ) -> None:
        self._loop, self._seconds, self._callback = loop, seconds, callback
        self._handle = loop.call_later(seconds, self._fire)

    def _fire(self) -> None:
        self._handle = self._loop.call_later(self._seconds, self._fire)
        self._callback()

    def cancel(self) -> None:
        self._handle.cancel()


class _Channel:
    """The back-end channel's socket."""

    def __init__(self, sock: socket.socket, channel: BackendChannel) -> None:
        self._channel = channel
        self._stream = FdStream(sock, self)
        self._stream.start()

    def wanted(self) -> int:
        return self._channel.wanted()

    def received(self, data: bytes, fds: list[int]) -> None:
        try:
            self._channel.feed(data, fds)
        except ProtocolError as error:
            log.error("back-end channel closed: %s", error)
            self._stream.close()
        else:
            self.flush()

    def closed(self, error: str | None) -> None:
        if error is not None:
            log.warning("back-end channel: %s", error)

    def fileno(self) -> int:
        return self._stream.fileno()

    def flush(self) -> None:
        for data, fds in self._channel.take_output():
            self._stream.send(data, fds)

    def cancel(self) -> None:
        self._stream.close()


class _Pipe:
    """One end of a pipe (or of a file, which is always ready), driven by the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        self._loop, self._fd = loop, fd
        try:
            os.set_blocking(fd, False)
            self._watch(self._ready)
            self._polled = False
        except PermissionError:  # a regular file: the loop cannot watch it
            self._polled = True
            loop.call_soon(self._ready)

    def _watch(self, callback: Callable[[], None]) -> None:
        raise NotImplementedError

    def _step(self) -> bool:
        """Move some bytes; False when that was all."""
        raise NotImplementedError

    def _report(self, trouble: str) -> None:
        raise NotImplementedError

    def _ready(self) -> None:
        if self._fd < 0:
            return
        try:
            more = self._step()
        except BlockingIOError:
            return
        except OSError as error:
            self.cancel()
            self._report(error.strerror or str(error))
            return
        if not more:
            self.cancel()
            self._report("")
        elif self._polled:
            self._loop.call_soon(self._ready)

    def cancel(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if not self._polled:
                self._unwatch_fd(fd)
            close_fds([fd])

    def _unwatch_fd(self, fd: int) -> None:
        raise NotImplementedError


class _Writer(_Pipe):
    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fd: int,
        data: bytes,
        done: Callable[[str], None],
    ) -> None:
        self._data, self._done = memoryview(data), done
        super().__init__(loop, fd)

    def _watch(self, callback: Callable[[], None]) -> None:
        self._loop.add_writer(self._fd, callback)

    def _unwatch_fd(self, fd: int) -> None:
        self._loop.remove_writer(fd)

    def _step(self) -> bool:
        if self._data:
            self._data = self._data[os.write(self._fd, self._data[:_CHUNK]) :]
        return bool(self._data)

    def _report(self, trouble: str) -> None:
        self._done(trouble)


class _Reader(_Pipe):
    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fd: int,
        limit: int,
        done: Callable[[bytes, str], None],
    ) -> None:
        self._data, self._limit, self._done = bytearray(), limit, done
        super().__init__(loop, fd)

    def _watch(self, callback: Callable[[], None]) -> None:
        self._loop.add_reader(self._fd, callback)

    def _unwatch_fd(self, fd: int) -> None:
        self._loop.remove_reader(fd)

    def _step(self) -> bool:
        part = os.read(self._fd, _CHUNK)
        self._data += part
        if len(self._data) > self._limit:
            raise OSError(errno.EFBIG, f"more than {self._limit} bytes of state")
        return bool(part)

    def _report(self, trouble: str) -> None:
        self._done(bytes(self._data), trouble)
