# SPDX-License-Identifier: Apache-2.0
"""One client connection as a value: bytes and descriptors in, bytes and descriptors out.

No socket, clock or thread.  The driver must, after every :meth:`Session.feed`, send what
:meth:`Session.take_output` gives, and close the connection when :attr:`Session.closed` is set;
when the peer has gone it must call :meth:`Session.receive_eof`.  The session owns the descriptors
that it is fed, and closes those that no handler took.

**DMA by message.**  A device may need the answer to a DMA_READ before it can go on.  The session
then asks its *wait* function to let the driver send, and to feed it, until the answer is there.
Commands that arrive meanwhile are served in order, so that a client which waits for one of them
(QEMU holds its global lock while it does) can come to answer us.  Two exceptions: while a command
is being served no other one is; and a command of ``handlers.EXCLUSIVE`` (a reset, say) cannot be
served in the middle of the device's work, so it ends that work by failing its DMA.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vfio_user import handlers
from vfio_user.device import PciDevice
from vfio_user.errors import DmaError, FatalError, RequestError
from vfio_user.remote import DmaRequests
from vfio_user.stream import HEADER, Message, Splitter, close_all
from virtio_formats.vfio_user import Capabilities, Command, Header, HeaderFlags
from virtio_formats.wire import WireError

__all__ = ("Session", "SessionLimits")

log = logging.getLogger(__name__)

Output = list[tuple[bytes, list[int]]]

_OF_GUEST = (Command.REGION_READ, Command.REGION_WRITE, Command.REGION_WRITE_MULTI)

_EARLY_FDS_MAX = 253
"""Descriptors that may wait for the rest of their message: what Linux sends with one."""

_REPLY, _ERROR = int(HeaderFlags.TYPE_REPLY), int(HeaderFlags.ERROR)


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """What a client can make the server hold."""

    max_msg_fds: int = 16
    """QEMU 11.1 takes an offer of more than 16 for malformed."""
    max_data_xfer_size: int = 1 << 20
    """Bytes of data in one message: the default of the specification, ample for a guest."""
    max_dma_maps: int = 65535
    """Regions: the default of the specification; each costs about a kilobyte."""
    max_queued: int = 1024
    """Commands that wait while the device waits for client memory: QEMU has two dozen threads."""

    @property
    def max_message(self) -> int:
        """Bytes of the largest message: the data, and room for the fixed parts."""
        return self.max_data_xfer_size + 4096


class Session:
    """The server's side of one connection, for *device*.

    *wait(done)* lets the driver exchange messages until *done()* is true; it raises
    :class:`TimeoutError` or :class:`ConnectionError`.  *open_twin()* makes a socket pair for
    server commands, keeps the server's end and returns the client's.
    """

    def __init__(
        self,
        device: PciDevice,
        *,
        limits: SessionLimits | None = None,
        wait: Callable[[Callable[[], bool]], None] | None = None,
        open_twin: Callable[[], int] | None = None,
    ) -> None:
        self.device = device
        self.limits = limits or SessionLimits()
        self.open_twin = open_twin
        self.client: Capabilities | None = None
        """What the client can do; None until it has negotiated."""
        self.closed = ""
        """Why the connection must be closed; empty while it is good."""
        self.errors = 0
        """Commands refused so far."""
        self.requests = DmaRequests(self, wait)
        self._input = Splitter(self.limits.max_message)
        self._twin_input = Splitter(self.limits.max_message)
        self._waiting: deque[Message] = deque()
        self._output: Output = []
        self._twin_output: Output = []
        self._serving = False
        self._ended = False

    # -- the driver's side ------------------------------------------------------------------------

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Bytes arrived, with descriptors that are the session's from now on."""
        if self.closed:
            close_all(list(fds))
            return
        for message in self._input.feed(data, list(fds)):
            if message.is_reply:
                self._answered(message)
            else:
                self._waiting.append(message)
        if len(self._waiting) > self.limits.max_queued:
            self.fail("more commands than the server holds at a time")
        if self._input.early > _EARLY_FDS_MAX:
            self.fail("more descriptors than a message can carry")
        self.drain()
        if self._input.malformed is not None and not self._serving and not self.closed:
            message, size = self._input.malformed
            self._refuse(message, errno.EINVAL)
            self.fail(f"a message of {size} bytes")

    def feed_twin(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Bytes arrived on the socket for server commands: replies only."""
        for message in self._twin_input.feed(data, list(fds)):
            message.close()
            if not message.is_reply or not self.requests.answer(message):
                self.fail("a message on the twin socket that is no reply")
        if self._twin_input.malformed is not None:
            self.fail("a malformed reply on the twin socket")

    def take_output(self) -> Output:
        """What to send now, in order; the descriptors are the caller's, to be closed when sent."""
        output, self._output = self._output, []
        return output

    def take_twin_output(self) -> Output:
        """The same for the socket for server commands."""
        output, self._twin_output = self._twin_output, []
        return output

    def receive_eof(self) -> None:
        """The peer has gone.  Everything of it is closed and unmapped; the device stays."""
        if self._ended:
            return
        self._ended = True
        self.closed = self.closed or "the client has gone"
        self._drop_input(errno.ENOTCONN)
        for _, fds in self._output:
            close_all(fds)
        self._output.clear()
        self._twin_output.clear()
        if self.client is not None:
            self.device.disconnect()

    def fail(self, reason: str) -> None:
        """The connection cannot go on; the driver closes it when the output is sent."""
        if not self.closed:
            self.closed = reason
            log.warning("closing the connection: %s", reason)
        self._drop_input(errno.ECONNABORTED)

    def _drop_input(self, error: int) -> None:
        self.requests.abort(error)
        for message in self._waiting:
            message.close()
        self._waiting.clear()
        self._input.close()
        self._twin_input.close()

    # -- commands and replies ---------------------------------------------------------------------

    def drain(self) -> None:
        """Serve the commands that wait, as far as they can be served now."""
        while self._waiting and not self._serving and not self.closed:
            if self.requests.busy and self._waiting[0].command in handlers.EXCLUSIVE:
                self.requests.abort(errno.ECANCELED)
                return
            self._serving = True
            try:
                self._serve(self._waiting.popleft())
            finally:
                self._serving = False

    def drain_later(self) -> None:
        """The device's work is done: commands that waited for its end can be served."""
        if self._waiting and not self._serving:
            self.device.defer(self.drain)

    def _serve(self, message: Message) -> None:
        try:
            payload, fds = handlers.handle(self, message)
        except RequestError as error:
            self._refused(message, error)
        except WireError as error:
            self._refused(message, RequestError(errno.EINVAL, str(error)))
        except DmaError as error:
            self._refused(message, RequestError(error.errno, str(error)))
        except Exception as error:
            # A device's own callback failed: the client is told, and the server goes on.
            log.error("%s: %s: %s", _name(message), type(error).__name__, error)
            self._refuse(message, errno.EIO)
        else:
            if message.wants_reply:
                self.send(message.command, payload, fds, msg_id=message.id, flags=_REPLY)
        finally:
            message.close()

    def _refused(self, message: Message, error: RequestError) -> None:
        # Register accesses are the guest's: it must not be able to fill the log.
        level = logging.DEBUG if message.command in _OF_GUEST else logging.INFO
        log.log(level, "%s refused: %s", _name(message), error)
        self._refuse(message, error.errno)
        if isinstance(error, FatalError):
            self.fail(error.text)

    def _refuse(self, message: Message, error: int) -> None:
        self.errors += 1
        if message.wants_reply:
            flags = _REPLY | _ERROR
            self.send(message.command, b"", [], msg_id=message.id, flags=flags, error=error)

    def _answered(self, message: Message) -> None:
        message.close()
        if self.requests.answer(message):
            return
        log.warning("a reply to nothing that was asked, id %d", message.id)
        if not message.flags & _ERROR:  # answering an error with an error could go on for ever
            self._refuse(message, errno.EINVAL)

    def send(
        self,
        command: int,
        payload: bytes,
        fds: list[int],
        *,
        msg_id: int,
        flags: int,
        error: int = 0,
        twin: bool = False,
    ) -> None:
        """Queue a message, on the socket for server commands if *twin*."""
        head = HEADER.pack(msg_id, command, Header.SIZE + len(payload), flags, error)
        (self._twin_output if twin else self._output).append((head + payload, fds))


def _name(message: Message) -> str:
    try:
        return Command(message.command).name
    except ValueError:
        return f"command {message.command}"
