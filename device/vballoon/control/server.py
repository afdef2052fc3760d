# SPDX-License-Identifier: Apache-2.0
"""The server of the control socket, which serves several QMP clients without blocking the device.

The requests of a client run one after the other, one for each turn of the loop.  Long ones run in a
thread.  A client that does not read is disconnected when its output exceeds a bound.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Any

import fdsocket
import vballoon
from vballoon.control.commands import log_problems
from vballoon.control.commands_snapshot import COMMANDS
from vballoon.control.events import EventThrottle
from vballoon.control.session import REQUESTS_MAX, CommandError, QmpSession, Request
from vballoon.control.table import Reply
from vballoon.errors import VballoonError

if TYPE_CHECKING:
    from vballoon.control.operator import Operator

__all__ = ("ControlServer",)

log = logging.getLogger(__name__)

READ_BYTES = 1 << 16
CLIENTS_MAX = 64
"""Maximum number of clients; further ones are disconnected."""


class ControlServer:
    """Serve *operator* on a listening socket, in the running loop."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.clients: set[Client] = set()
        self._problems: set[str] = set()
        self._throttle = EventThrottle(self._broadcast)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._acceptor: fdsocket.Acceptor | None = None
        self._poll: asyncio.TimerHandle | None = None

    def start(self, listener: socket.socket) -> None:
        """Accept clients on *listener*, which is owned from now on, and send them events."""
        self._loop = asyncio.get_running_loop()
        self._acceptor = fdsocket.Acceptor(listener, self._accepted, self._not_accepted)
        self._acceptor.resume()
        self.operator.balloon.events = self.event
        self.operator.interval_changed = self._poll_stats

    def close(self) -> None:
        """Stop listening and disconnect the clients."""
        if self._poll is not None:
            self._poll.cancel()
        if self._acceptor is not None:
            self._acceptor.close()
        for client in tuple(self.clients):
            client.finish()

    def event(self, name: str, data: dict[str, Any]) -> None:
        """Send the event *name* to all clients."""
        if self._loop is not None:
            self._throttle(self._loop, name, data)

    def report_problems(self) -> None:
        """Log what is wrong with the configuration, each problem once."""
        log_problems(self.operator, self._problems)

    def _broadcast(self, name: str, data: dict[str, Any], at: float) -> None:
        for client in tuple(self.clients):
            client.event(name, data, at)

    def _not_accepted(self, error: OSError) -> None:
        log.error("control: cannot accept a client: %s", error.strerror)

    def _accepted(self, connection: socket.socket) -> None:
        if len(self.clients) >= CLIENTS_MAX:
            log.warning("control: more than %d clients; the new one was disconnected", CLIENTS_MAX)
            connection.close()
            return
        self.clients.add(Client(self, connection))

    def _poll_stats(self) -> None:
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        if self.operator.stats_interval and self._loop is not None:
            self.operator.balloon.request_stats()
            self._poll = self._loop.call_later(self.operator.stats_interval, self._poll_stats)


class Client:
    """One connection of the control socket."""

    def __init__(self, server: ControlServer, connection: socket.socket) -> None:
        numbers = (vballoon.__version__.split(".") + ["0"] * 3)[:3]
        major, minor, micro = (int(n) if n.isdigit() else 0 for n in numbers)
        self._server = server
        self._session = QmpSession((major, minor, micro), f"vballoon {vballoon.__version__}")
        self._requests: deque[Request] = deque()
        self._task: asyncio.Task[None] | None = None
        self._user = _user_of(connection)
        self._stream = fdsocket.FdStream(connection, self)
        self._stream.start()
        self._flush()

    # fdsocket.Receiver

    def wanted(self) -> int:
        """Return how many bytes may be read at once."""
        return READ_BYTES

    def received(self, data: bytes, fds: list[int]) -> None:
        """Handle bytes from the client; close descriptors, which no command takes."""
        fdsocket.close_fds(fds)
        self._requests.extend(self._session.feed(data))
        if len(self._requests) > REQUESTS_MAX:
            self._session.end(f"more than {REQUESTS_MAX} commands are waiting for a reply")
            self._requests.clear()
        self._flush()
        if self._requests and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def closed(self, error: str | None) -> None:
        """Drop the client's requests after its connection has ended."""
        if error is not None:
            log.info("control: a client disconnected: %s", error)
        self._requests.clear()
        self._server.clients.discard(self)

    # output

    def event(self, name: str, data: dict[str, Any], at: float) -> None:
        """Send an event to the client."""
        self._session.event(name, data, at)
        self._flush()

    def finish(self) -> None:
        """Disconnect once the output is sent."""
        self._requests.clear()
        self._stream.close_when_sent()

    def _flush(self) -> None:
        for data, fds in self._session.take_output():
            self._stream.send(data, fds)
        if self._session.ended:
            self.finish()

    async def _run(self) -> None:
        try:
            while self._requests:
                await self._answer(self._requests.popleft())
                self._flush()
                await asyncio.sleep(0)  # let other clients run
        finally:
            self._task = None

    async def _answer(self, request: Request) -> None:
        try:
            command = COMMANDS.find(request.name)
            command.authorize(self._user)
            result = command.run(self._server.operator, **command.bind(request.arguments))
            if inspect.isawaitable(result):
                result = await result
        except CommandError as error:
            self._session.fail(request, error)
        except VballoonError as error:
            self._session.fail(request, CommandError(str(error)))
        except Exception:
            log.exception("control: command %s failed", request.name)
            self._session.fail(request, CommandError("internal error; see the log of the server"))
        else:
            reply = result if isinstance(result, Reply) else Reply(result)
            self._session.reply(request, reply.value, reply.fds)


def _user_of(connection: socket.socket) -> int:
    """Return the user id that the client had when it connected."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(credentials)[1])


_UCRED = struct.Struct("iII")  # struct ucred: process, user, group
