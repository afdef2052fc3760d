# SPDX-License-Identifier: Apache-2.0
"""One client connection as a value: bytes and descriptors in, bytes and descriptors out.

No socket, clock or thread.  After every :meth:`Session.feed` the driver must send what
:meth:`Session.take_output` returns, and close the connection once :attr:`Session.is_open` is
False; when the peer has closed it must call :meth:`Session.receive_eof`.  The session owns the
descriptors that it is fed, and closes those that no handler took.

**DMA by message.**  A device may need the answer to a DMA_READ before it can continue.  The
session then asks its *wait* function to let the driver send, and to feed it, until the answer has
arrived.  Commands that arrive meanwhile are served in order, so that a client which waits for one
of them (QEMU holds its global lock while it does) can get to answer the server.  Two exceptions:
while one command is being served no other one is; and a command that changes the device as a
whole (``handlers.is_exclusive``) cannot be served in the middle of the device's work.  A reset ends
that work by failing its DMA with ECANCELED; any other waits for the end of the work, and the
driver ends it the same way when that takes too long.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from vfio_user import handlers
from vfio_user.device import PciDevice
from vfio_user.errors import DmaError, FatalError, RequestError
from vfio_user.faults import report_fault
from vfio_user.link import Link, Output, SessionLimits
from vfio_user.remote import DmaRequests
from vfio_user.resume import capture, restore
from vfio_user.state import SessionState
from vfio_user.steps import Run, Spawn, Steps, run_now
from vfio_user.stream import Message, Splitter, close_all
from virtio_formats.vfio_user import Capabilities, Command, HeaderFlags
from virtio_formats.wire import WireError

__all__ = ("Session",)

log = logging.getLogger(__name__)

_OF_GUEST = (Command.REGION_READ, Command.REGION_WRITE, Command.REGION_WRITE_MULTI)

_EARLY_FDS_MAX = 253
"""Descriptors that may wait for the rest of their message: the limit of Linux for one message."""

_REPLY, _ERROR = int(HeaderFlags.TYPE_REPLY), int(HeaderFlags.ERROR)


class Session:
    """The server's side of one connection, for *device*.

    *wait(done)* lets the driver exchange messages until *done()* is true; it raises
    :class:`TimeoutError` or :class:`ConnectionError`.  *open_twin()* makes a socket pair for
    server commands, keeps the server's end and returns the client's.  *spawn(coroutine, done)*
    lets a device's ``async def quiesce`` run, calls *done(error or None)* at its end, and returns
    a function that cancels it; without it, such a method must not really wait.
    """

    def __init__(
        self,
        device: PciDevice,
        *,
        limits: SessionLimits | None = None,
        wait: Callable[[Callable[[], bool]], None] | None = None,
        open_twin: Callable[[], int] | None = None,
        spawn: Spawn | None = None,
    ) -> None:
        self.device = device
        self.limits = limits or SessionLimits()
        self.errors = 0
        """Commands refused so far."""
        self.link = Link(self.limits, open_twin)
        self.requests = DmaRequests(self.link, wait, self._drain_later)
        self.link.channel = self.requests
        self._input = Splitter(self.limits.max_message)
        self._twin_input = Splitter(self.limits.max_message)
        self._waiting: deque[Message] = deque()
        self._serving = False
        self._spawn = device.spawn = spawn or run_now
        self._quiet = False  # for the first command that waits
        self._cancel_quiesce: Callable[[], object] | None = None  # while the device quiesces
        self._ended = False

    @property
    def is_open(self) -> bool:
        """Whether the connection can continue; if not, the driver sends the output and closes."""
        return self.link.is_open

    @property
    def error(self) -> str | None:
        """Why the connection had to be closed; None while it is open, or for an orderly end."""
        return self.link.error

    @property
    def client(self) -> Capabilities | None:
        """The client's capabilities; None until it has negotiated."""
        return self.link.client

    # -- the driver's side ------------------------------------------------------------------------

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes that arrived, and their descriptors, which become the session's."""
        if not self.is_open:
            close_all(list(fds))
            return
        for message in self._input.feed(data, list(fds)):
            if not self.is_open:
                message.close()
            elif message.is_reply:
                self._answered(message)
            else:
                self._waiting.append(message)
                self.drain()
                if len(self._waiting) > self.limits.max_queued:
                    self.close("more commands than the server holds at a time")
        if self._input.early > _EARLY_FDS_MAX:
            self.close("more descriptors than a message can carry")
        if self._input.malformed is not None and not self._serving and self.is_open:
            message, size = self._input.malformed
            self._refuse(message, errno.EINVAL)
            self.close(f"a message of {size} bytes")

    def feed_twin(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes that arrived on the socket for server commands: replies only."""
        for message in self._twin_input.feed(data, list(fds)):
            message.close()
            if not message.is_reply or not self.requests.answer(message):
                self.close("a message on the twin socket that is not a reply")
        if self._twin_input.malformed is not None:
            self.close("a malformed reply on the twin socket")

    def take_output(self) -> Output:
        """Return what to send now, in order; the caller closes the descriptors once sent."""
        return self.link.take_output()

    def take_twin_output(self) -> Output:
        """Return what to send now on the socket for server commands."""
        return self.link.take_twin_output()

    def receive_eof(self, error: str | None = None) -> None:
        """Release everything of the client: the connection has ended, by *error* if not None.

        The device stays.
        """
        if self._ended:
            return
        self._ended = True
        self.link.close(error)
        self._drop_input(errno.ENOTCONN)
        for _, fds in self.take_output():
            close_all(fds)
        self.take_twin_output()
        if self.client is not None:
            self.device.disconnect(self.error)

    def close(self, error: str | None = None) -> None:
        """End the connection; the driver closes it once the output is sent.

        *error* says why, None for an orderly end.
        """
        self.link.close(error)
        self._drop_input(errno.ECONNABORTED)

    def _drop_input(self, error: int) -> None:
        if self._cancel_quiesce is not None:
            self._cancel_quiesce()
        self.requests.abort(error)
        for message in self._waiting:
            message.close()
        self._waiting.clear()
        self._input.close()
        self._twin_input.close()

    # -- state ------------------------------------------------------------------------------------

    def state(self) -> SessionState:
        """Return the connection, what the client has set up, and the function, as one value.

        Messages that wait or are incomplete are not part of it.
        """
        return capture(self.link, self.device, self.requests)

    def restore(self, state: SessionState, fds: Mapping[int, int]) -> None:
        """Continue a connection from *state*.

        *fds* has the descriptors by slot; they stay the caller's, the session keeps duplicates.
        For a new session of a device without a client.  Raise
        :class:`~vfio_user.errors.RequestError` EINVAL for a state that cannot be this device's;
        nothing has changed then.  What the device's hooks raise passes, and the client's part is
        released first.
        """
        restore(self.link, self.device, self.requests, state, fds)

    # -- commands and replies ---------------------------------------------------------------------

    def drain(self) -> None:
        """Serve the commands that wait, as far as they can be served now."""
        while self._waiting and not self._serving and self.is_open and not self.device.changes:
            if self.blocked:
                if self._waiting[0].command == Command.DEVICE_RESET:
                    self.cancel_work()
                return
            if not self._quiet and handlers.needs_quiet(self._waiting[0]):
                self._quiesce()
                continue
            self._quiet = False
            self._serve(self._waiting.popleft())

    def _quiesce(self) -> None:
        """Quiesce the device for the first command that waits; others wait with it."""
        self._serving = True
        try:
            waiting = self.device.quiesce()
        except Exception as error:
            self._quiesced(error)
            return
        if waiting is None:
            self._quiesced(None)
            return
        self._cancel_quiesce = lambda: None
        cancel = self._spawn(waiting, self._quiesced)
        if self._cancel_quiesce is not None:  # it has not ended yet
            self._cancel_quiesce = cancel

    def _quiesced(self, error: BaseException | None) -> None:
        """Continue after the device has come to rest for one command, or failed to."""
        resumed, self._cancel_quiesce = self._cancel_quiesce is not None, None
        self._serving = False
        if not self._waiting:  # the client has disconnected meanwhile
            return
        self._quiet = True
        if error is not None:
            message = self._waiting.popleft()
            self._quiet = False
            self._failed(message, error)
            message.close()
        if resumed:
            self.device.wake()  # the driver drains, and sends

    @property
    def quiescing(self) -> bool:
        """Return whether a command waits for the device to quiesce."""
        return self._cancel_quiesce is not None

    @property
    def blocked(self) -> bool:
        """Return whether a command waits for the end of the device's work.

        The driver calls :meth:`cancel_work` when that takes too long: the client may be unable
        to answer DMA messages while it waits for its own command.
        """
        if not self.requests.busy or not self._waiting or self._serving:
            return False
        return handlers.is_exclusive(self._waiting[0])

    def cancel_work(self) -> None:
        """Fail the DMA that the device waits for with ECANCELED."""
        self.requests.abort(errno.ECANCELED)

    def _drain_later(self) -> None:
        """Serve the commands that waited for the end of the device's work."""
        if self._waiting and not self._serving:
            self.device.wake()

    def _serve(self, message: Message) -> None:
        """Serve one command; the next one waits until it is answered."""
        self._serving = True
        try:
            if handlers.is_exclusive(message) and message.command != Command.DEVICE_RESET:
                self.device.finish_work()
            reply = handlers.handle(self.link, self.device, message)
        except Exception as error:
            self._served(message, None, error)
            return
        if isinstance(reply, tuple):
            self._served(message, reply, None)
        else:
            self._take_steps(message, reply)

    def _take_steps(self, message: Message, steps: Steps[handlers.Reply]) -> None:
        later = False

        def done(result: handlers.Reply | None, error: BaseException | None) -> None:
            self.device.changes -= later
            self._served(message, result, error)
            if later:
                self.device.wake()  # the driver drains, and sends

        run = Run(steps, self._spawn, done)
        if not run.ended:  # a hook of the device waits; the device may outlive this session
            later = True
            self.device.changes += 1

    def _served(
        self, message: Message, result: handlers.Reply | None, error: BaseException | None
    ) -> None:
        self._serving = False
        try:
            if not self.is_open:
                close_all(result[1] if result else [])
            elif error is not None:
                self._failed(message, error)
            elif message.wants_reply and result is not None:
                payload, fds = result
                self.link.send(message.command, payload, fds, msg_id=message.id, flags=_REPLY)
        finally:
            message.close()

    def _failed(self, message: Message, error: BaseException) -> None:
        match error:
            case RequestError():
                self._refused(message, error)
            case WireError():
                self._refused(message, RequestError(errno.EINVAL, str(error)))
            case DmaError():
                self._refused(message, RequestError(error.errno, str(error)))
            case _:  # a fault of the device: report it to the client and continue to serve
                report_fault(_name(message), error)
                self._refuse(message, errno.EIO)

    def _refused(self, message: Message, error: RequestError) -> None:
        # Register accesses come from the guest, which must not be able to fill the log.
        level = logging.DEBUG if message.command in _OF_GUEST else logging.INFO
        log.log(level, "%s refused: %s", _name(message), error)
        self._refuse(message, error.errno)
        if isinstance(error, FatalError):
            self.close(error.text)

    def _refuse(self, message: Message, error: int) -> None:
        self.errors += 1
        if message.wants_reply:
            flags = _REPLY | _ERROR
            self.link.send(message.command, b"", [], msg_id=message.id, flags=flags, error=error)

    def _answered(self, message: Message) -> None:
        message.close()
        if self.requests.answer(message):
            return
        log.warning("unsolicited reply, id %d", message.id)
        if not message.flags & _ERROR:  # two sides that answer errors with errors never stop
            self._refuse(message, errno.EINVAL)


def _name(message: Message) -> str:
    try:
        return Command(message.command).name
    except ValueError:
        return f"command {message.command}"
