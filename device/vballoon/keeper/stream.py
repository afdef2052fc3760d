# SPDX-License-Identifier: Apache-2.0
"""Handle messages atomically: if this process is killed at any step, the next one finishes.

The order for a message is: peek at it, handle it, make the next process know (:data:`Commit`
writes the journal), answer, take it from the socket.  The next process finds out how far
that got from two file positions, which the kernel advances in the system call that moves the bytes:

* the offset of the file of answers (:mod:`vballoon.keeper.answers`): how much was sent;
* the socket's peek offset (``SO_PEEK_OFF``): a read moves it back by what it took.  It is set
  to a mark above the message's size before the journal is written.  The distance to the mark is
  how much of the journaled message is still in the socket.  The bytes themselves could not say
  that, because the next message may be equal.

Answers that carry descriptors cannot be sent with ``sendfile``: they are sent before the journal is
written, and a process that dies in between answers twice.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fdsocket import Receiver, close_fds, receive_some, send_some
from vballoon.keeper import fault
from vballoon.keeper.answers import AnswerFile

__all__ = ("Framing", "MessageStream", "Progress")

MESSAGES_PER_WAKEUP = 32
"""Maximum messages for each wakeup, so that a peer cannot monopolise the loop."""
_SO_PEEK_OFF = 42
"""See socket(7); the socket module has no name for it.  The number of x86-64 and aarch64."""
_MARK = 1 << 22
"""Above the size of any message: a mark is never taken for the offset of a peek under way."""


class Framing(Protocol):
    """How a protocol's messages are cut out of the stream."""

    header: int
    """Bytes of a header."""

    def total(self, header: bytes) -> int:
        """Return the size of the message in bytes; the size of the header if it is malformed."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The message last handled: its number, its size, and the size of its answer, in bytes."""

    number: int = 0
    size: int = 0
    answer: int = 0


Commit = Callable[[Progress], None]
"""Makes everything that handling a message has changed known to the next process."""


class MessageStream:
    """One connection, with the calls of :class:`fdsocket.FdStream` that a session's shell uses.

    *commit* is called for each message, *settled* once it was taken.  *progress* is what an
    earlier process committed last; the message that it names is finished first.
    """

    def __init__(
        self,
        sock: socket.socket,
        receiver: Receiver,
        framing: Framing,
        answers: AnswerFile,
        commit: Commit,
        *,
        settled: Callable[[], None] = lambda: None,
        progress: Progress | None = None,
    ) -> None:
        sock.setblocking(False)
        self._sock, self._receiver, self._framing = sock, receiver, framing
        self._answers, self._commit, self._settled = answers, commit, settled
        self.progress = progress or Progress()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._edges: select.epoll | None = None
        self._output: list[tuple[bytes, list[int]]] = []
        self.handling = False
        """Whether the receiver has a message at hand."""
        self._held: int | None = None  # size of a message whose answer is not known yet
        self._blocked = False  # the socket takes no more of an answer now
        self._open, self._closing = True, False

    @property
    def is_open(self) -> bool:
        """Whether the connection is up."""
        return self._open

    def fileno(self) -> int:
        """Return the socket's descriptor number, -1 after :meth:`close`."""
        return self._sock.fileno()

    def start(self) -> None:
        """Finish what an earlier process began, then read for the receiver, in the running loop."""
        self._loop = asyncio.get_running_loop()
        # Level-triggered watching would spin on a message that stays in the socket.
        self._edges = select.epoll()
        self._edges.register(self._sock, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        self._loop.add_reader(self._edges.fileno(), self._on_edge)
        if self._finish():
            self._loop.call_soon(self._read)

    # -- input --------------------------------------------------------------------------------

    def _on_edge(self) -> None:
        if self._edges is not None:
            self._edges.poll(0)
            self._read()

    def _read(self) -> None:
        for _ in range(MESSAGES_PER_WAKEUP):
            if not self._may_read or not self._step():
                return
        if self._loop is not None:
            self._loop.call_soon(self._read)

    @property
    def _may_read(self) -> bool:
        return self._open and not self._closing and not self._blocked and self._held is None

    def _step(self) -> bool:
        """Handle the next message; return False when none is complete."""
        try:
            message = self._peek()
        except OSError as error:
            self._end(error.strerror or str(error))
            return False
        if message is None:
            return False
        fault.step("message-peeked")
        data, fds = message
        self.handling = True
        try:
            self._receiver.received(data, fds)
        finally:
            self.handling = False
        fault.step("message-handled")
        if self._closing:
            self._close_when_sent()
            return False
        if self._output or not self._answer_due():
            self._conclude(len(data))
        else:
            self._held = len(data)
        return self._may_read

    def _answer_due(self) -> bool:
        waiting = getattr(self._receiver, "waiting", None)
        return bool(waiting is not None and waiting())

    def _peek(self) -> tuple[bytes, list[int]] | None:
        """Return the next message and its descriptors, which stay in the socket too.

        Every peek hands out new descriptors: those of the header alone are closed.  A peek ends
        after a buffer that carries descriptors; the peek offset lets the next one pass it.
        """
        head = self._peek_exactly(self._framing.header)
        if head is None:
            return None
        close_fds(head[1])
        return self._peek_exactly(self._framing.total(head[0]))

    def _peek_exactly(self, size: int) -> tuple[bytes, list[int]] | None:
        """Return *size* bytes and the descriptors of the buffers that they are in.

        A peek that has all its bytes still looks at the next buffer, and hands out the descriptors
        of that one.  So one byte more is asked for: it is there if, and only if, the descriptors
        are those of the next message.
        """
        self._set_mark(0)
        data, fds = b"", list[int]()
        try:
            while len(data) < size:
                part, more = receive_some(self._sock, size + 1 - len(data), socket.MSG_PEEK)
                if len(data) + len(part) > size:
                    close_fds(more)
                    return data + part[:-1], fds
                fds += more
                if not part:
                    close_fds(fds)
                    self._end_of_file()
                    return None
                data += part
        except BlockingIOError:
            close_fds(fds)
            return None
        except OSError:
            close_fds(fds)
            raise
        return data, fds

    def _end_of_file(self) -> None:
        """Pass a truncated last message to the session, then end: the peer has closed its end."""
        try:
            data, fds = receive_some(self._sock, _MARK)
        except OSError as error:
            self._end(error.strerror or str(error))
            return
        if data:
            self._receiver.received(data, fds)
        self._end(None)

    # -- one message --------------------------------------------------------------------------

    def _conclude(self, size: int) -> None:
        """Commit, answer and take the handled message of *size* bytes."""
        output, self._output = self._output, []
        number = self.progress.number + 1
        data = b"".join(part for part, _ in output)
        if any(fds for _, fds in output):
            if not self._send_now(output):
                return
            fault.step("descriptors-sent")
            data = b""
        self._set_mark(_mark(number) + size)
        fault.step("message-marked")
        if data:
            self._answers.prepare(number, data)
        progress = Progress(number, size, len(data))
        self._commit(progress)
        self.progress = progress
        fault.step("message-committed")
        self._finish()

    def _finish(self) -> bool:
        """Send the rest of the answer and take the rest of the message.

        Return False if the socket is full or has failed.
        """
        if self._blocked and self._loop is not None:
            self._loop.remove_writer(self._sock)
            self._blocked = False
        number = self.progress.number
        try:
            if not self._answers.send(self._sock.fileno(), number, self.progress.answer):
                self._wait_for_room()
                return False
            fault.step("message-answered")
            while left := self._left():
                part, fds = receive_some(self._sock, left)
                close_fds(fds)
                if not part:
                    raise ConnectionResetError("a journaled message is no longer there")
                fault.step("message-taken")
        except OSError as error:
            self._end(error.strerror or str(error))
            return False
        self._settled()
        fault.step("message-settled")
        return True

    def _wait_for_room(self) -> None:
        assert self._loop is not None
        self._blocked = True
        self._loop.add_writer(self._sock, self._on_room)

    def _on_room(self) -> None:
        if self._finish():
            self._read()

    def _left(self) -> int:
        """Return how many bytes of the committed message are still in the socket."""
        offset = self._sock.getsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF)
        left = offset - _mark(self.progress.number)
        return left if 0 < left <= self.progress.size else 0

    def _set_mark(self, offset: int) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, offset)

    # -- output -------------------------------------------------------------------------------

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Answer the message that is being handled, and take ownership of *fds*."""
        if not self._open:
            close_fds(fds)
            return
        self._output.append((data, list(fds)))
        if not self.handling and self._held is not None:
            size, self._held = self._held, None
            self._conclude(size)
            if self._loop is not None:
                self._loop.call_soon(self._read)

    def _send_now(self, output: list[tuple[bytes, list[int]]]) -> bool:
        """Send with descriptors, blocking for as long as the peer reads nothing."""
        try:
            for data, fds in output:
                view = memoryview(data)
                while view:
                    try:
                        view = view[send_some(self._sock, view, fds) :]
                    except BlockingIOError:
                        select.select([], [self._sock], [])
                    else:
                        close_fds(fds)
                        fds = []
        except OSError as error:
            self._end(error.strerror or str(error))
            return False
        return True

    # -- end ----------------------------------------------------------------------------------

    def close_when_sent(self) -> None:
        """Read no more, and close once the output is written."""
        self._closing = True
        if not self.handling:
            self._close_when_sent()

    def _close_when_sent(self) -> None:
        output, self._output = self._output, []
        for data, fds in output:
            try:
                send_some(self._sock, data, fds)
            except OSError:
                pass  # the connection ends in any case
            close_fds(fds)
        self.close()

    def close(self) -> None:
        """Close the socket; safe to call again."""
        self._end(None)

    def _end(self, reason: str | None) -> None:
        if not self._open:
            return
        self._open = False
        if self._loop is not None and self._edges is not None:
            self._loop.remove_reader(self._edges.fileno())
            if self._blocked:
                self._loop.remove_writer(self._sock)
            self._edges.close()
            self._edges = None
        for _, fds in self._output:
            close_fds(fds)
        self._output.clear()
        self._sock.close()
        if self._loop is not None:
            self._loop.call_soon(self._receiver.closed, reason)
        else:
            self._receiver.closed(reason)


def _mark(number: int) -> int:
    """Return the peek offset that means "message *number* was taken"; consecutive ones differ."""
    return _MARK * (1 + number % 2)
