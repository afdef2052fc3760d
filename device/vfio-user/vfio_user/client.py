# SPDX-License-Identifier: Apache-2.0
"""A client on a Unix socket, on asyncio: drives any vfio-user server.

::

    async with await Client.connect("dev.sock") as client:
        await client.map(ram := Ram(0x10000, 0x1000))
        await client.call(region_write(0, 0, b"go"))

It answers the server's DMA messages from the memory that it has mapped.
"""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import replace
from typing import TypeVar

import fdsocket
from vfio_user import requests
from vfio_user.errors import VfioUserError
from vfio_user.ram import Ram, answer_dma, message
from vfio_user.requests import Reply, Request
from vfio_user.stream import Message, Splitter, close_all
from virtio_formats.vfio_user import Capabilities, HeaderFlags

__all__ = ("Client", "CommandError")

T = TypeVar("T")

_READ_SIZE = 1 << 16
_MESSAGE_MAX = 1 << 21
CAPABILITIES = Capabilities(max_msg_fds=16, write_multiple=True, migration_pgsize=4096)
"""The default proposal of a client."""


class CommandError(VfioUserError):
    """The server answered a command with an error; *errno* is its number."""

    def __init__(self, command: str, errno: int) -> None:
        super().__init__(f"{command}: {os.strerror(errno)}")
        self.errno = errno


class Client:
    """One connection to a server.  *timeout* is in seconds, for each command."""

    def __init__(self, sock: socket.socket, *, timeout: float = 5.0) -> None:
        self.timeout = timeout
        self.memory: list[Ram] = []
        """What DMA messages reach."""
        self.server: Capabilities | None = None
        """The server's capabilities; None until :meth:`negotiate`."""
        self._id = 0
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._input = Splitter(_MESSAGE_MAX)
        self._stream = fdsocket.FdStream(sock, self)
        self._stream.start()

    @classmethod
    async def connect(
        cls, path: str | os.PathLike[str], capabilities: Capabilities = CAPABILITIES
    ) -> Client:
        """Connect to the server at *path* and negotiate.  Raise OSError or CommandError."""
        client = cls(fdsocket.connect(path))
        try:
            await client.negotiate(capabilities)
        except BaseException:
            client.close()
            raise
        return client

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    @property
    def is_open(self) -> bool:
        """Return whether the connection can continue."""
        return self._stream.is_open

    @property
    def error(self) -> str | None:
        """Why the connection ended; None while it is open, or for an orderly end."""
        return self._stream.error

    def close(self) -> None:
        """Close the connection; commands that wait raise ConnectionError."""
        self._stream.close()

    # -- commands ---------------------------------------------------------------------------------

    async def call(self, request: Request[T]) -> T:
        """Send a command of :mod:`vfio_user.requests` and return what its reply says.

        Raise :class:`CommandError` for an error reply, :class:`TimeoutError`, and
        :class:`ConnectionError` when the connection ends first.
        """
        self._id = (self._id + 1) & 0xFFFF
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[self._id] = future
        msg_id = self._id
        self._send(request, msg_id, 0)
        try:
            reply = await asyncio.wait_for(future, self.timeout)
        finally:
            self._waiting.pop(msg_id, None)
        if reply.flags & HeaderFlags.ERROR:
            raise CommandError(request.command.name, reply.error)
        return request.parse(Reply(reply.payload, tuple(reply.fds)))

    def post(self, request: Request[T]) -> None:
        """Send a command that wants no reply."""
        self._id = (self._id + 1) & 0xFFFF
        self._send(request, self._id, int(HeaderFlags.NO_REPLY))

    async def negotiate(self, capabilities: Capabilities = CAPABILITIES) -> Capabilities:
        """Negotiate; return what the server can do.  (A twin socket is not supported.)"""
        proposed = replace(capabilities, twin_socket=False)
        self.server = await self.call(requests.version(proposed))
        return self.server

    async def map(self, ram: Ram, *, shared: bool = True) -> None:
        """Map *ram*; without *shared* the server reaches it by messages only."""
        self.memory.append(ram)
        fd = ram.fd if shared else None
        await self.call(requests.dma_map(ram.address, ram.size, fd=fd))

    async def unmap(self, ram: Ram) -> None:
        """Unmap *ram*."""
        await self.call(requests.dma_unmap(ram.address, ram.size))
        self.memory.remove(ram)

    def _send(self, request: Request[T], msg_id: int, flags: int) -> None:
        if not self._stream.is_open:
            raise ConnectionResetError(self.error or "the connection has ended")
        data = message(request.command, request.payload, msg_id=msg_id, flags=flags)
        self._stream.send(data, [os.dup(fd) for fd in request.fds])

    # -- what the stream asks of its receiver -----------------------------------------------------

    def wanted(self) -> int:
        """See :class:`fdsocket.Receiver`."""
        return _READ_SIZE

    def received(self, data: bytes, fds: list[int]) -> None:
        """See :class:`fdsocket.Receiver`."""
        for one in self._input.feed(data, fds):
            if one.is_reply:
                self._answered(one)
            else:
                one.close()
                self._stream.send(answer_dma(self.memory, one.command, one.id, one.payload))
        if self._input.malformed is not None:
            self._stream.close()

    def _answered(self, reply: Message) -> None:
        future = self._waiting.get(reply.id)
        if future is None or future.done():
            close_all(reply.fds)
        else:
            future.set_result(reply)

    def closed(self, error: str | None) -> None:
        """See :class:`fdsocket.Receiver`."""
        self._input.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionResetError(error or "the server disconnected"))
