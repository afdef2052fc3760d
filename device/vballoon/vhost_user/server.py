# SPDX-License-Identifier: Apache-2.0
"""The server: one front-end after the other, by listening, connecting or an inherited descriptor.

"Communication", ``Backend program conventions`` of vhost-user.rst (QEMU 11.1.3): the back-end may
be either side of the socket; ``--socket-path`` and ``--fd`` exclude each other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import fdsocket
from vballoon.errors import UsageError
from vballoon.vhost_user.backend import (
    DEFAULT_RING_FEATURES,
    PROTOCOL_FEATURES,
    VhostUserBackend,
)
from vballoon.vhost_user.shell import Connection
from vballoon.virtio import TransportEvents, TransportStatus, VirtioDevice
from vballoon.virtqueue import Engine
from virtio_formats.vhost_user import ProtocolFeature

__all__ = ("VhostUserServer",)

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
"""Between two attempts to connect to a front-end that is not there (yet)."""


class VhostUserServer:
    """Serves *device* to front-ends, one at a time.

    Exactly one of *path* and *fd* is given.  With *client*, *path* is connected to (again
    whenever the front-end has gone) instead of listened on; *fd* may be a listening socket or a
    connection.  *device_names* names the device's feature bits (bit number to name) for
    :meth:`status`.
    """

    def __init__(
        self,
        device: VirtioDevice,
        *,
        path: str | os.PathLike[str] | None = None,
        fd: int | None = None,
        client: bool = False,
        ring_features: int = DEFAULT_RING_FEATURES,
        protocol_features: ProtocolFeature = PROTOCOL_FEATURES,
        events: TransportEvents | None = None,
        engine: Engine = "batch",
        device_names: Mapping[int, str] | None = None,
    ) -> None:
        if (path is None) == (fd is None):
            raise UsageError("give either a socket path or a descriptor")
        if client and path is None:
            raise UsageError("a client needs the path of the front-end's socket")
        self.device = device
        self.events = events or TransportEvents()
        self._path, self._fd, self._client = path, fd, client
        self._ring_features, self._protocol_features = ring_features, protocol_features
        self._engine = engine
        self._names = device_names
        self._connection: Connection | None = None
        self._counters: Counter[str] = Counter()
        self._listener: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def backend(self) -> VhostUserBackend | None:
        """The back-end of the connected front-end."""
        return self._connection.backend if self._connection else None

    def status(self) -> TransportStatus:
        """Return what is connected, negotiated and running."""
        counters, backend = self._counters.copy(), self.backend
        if backend is None:
            return TransportStatus(counters=dict(counters))
        counters.update(_counters(backend))
        return backend.status(counters, self._names)

    def open(self) -> None:
        """Make the socket ready, so that a front-end can connect from now on.

        Raises :class:`~vballoon.errors.UsageError` with what to do about it.
        """
        if self._client or self._listener is not None:
            return
        try:
            if self._path is not None:
                self._listener = fdsocket.listen(self._path)
            elif self._fd is not None:
                self._listener = fdsocket.adopt(self._fd)
        except OSError as error:
            where = self._path if self._path is not None else f"descriptor {self._fd}"
            raise UsageError(f"{where}: {error.strerror or error}") from None

    async def serve(self) -> None:
        """Serve front-ends until :meth:`close`; over an inherited connection, that one only."""
        self.open()
        self._task = asyncio.current_task()
        try:
            if self._client:
                while True:
                    await self._serve_one(await self._connect())
            assert self._listener is not None
            if not fdsocket.is_listening(self._listener):
                sock, self._listener = self._listener, None
                await self._serve_one(sock)
                return
            while True:
                sock = await self._accept(self._listener)
                await self._serve_one(sock)
        finally:
            self._release()

    def close(self) -> None:
        """Let the front-end go and stop serving."""
        if self._task is not None:
            self._task.cancel()
        else:
            self._release()

    async def _serve_one(self, sock: socket.socket) -> None:
        connection = Connection(sock, self._make_backend)
        self._connection = connection
        log.info("front-end connected")
        self.events.frontend_connected()
        try:
            reason = await asyncio.shield(connection.ended)
        except asyncio.CancelledError:
            connection.close()
            await connection.ended
            raise
        finally:
            self._counters.update(_counters(connection.backend))
            self._connection = None
        log.info("front-end disconnected%s", f": {reason}" if reason else "")
        self.events.frontend_disconnected(reason)

    def _make_backend(self, connection: Connection) -> VhostUserBackend:
        return VhostUserBackend(
            self.device,
            connection,
            ring_features=self._ring_features,
            protocol_features=self._protocol_features,
            events=self.events,
            engine=self._engine,
        )

    async def _accept(self, listener: socket.socket) -> socket.socket:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
                return sock
            except OSError as error:  # too many open files, most likely: it may pass
                log.error("cannot accept a front-end: %s", error.strerror)
                await asyncio.sleep(RETRY_SECONDS)

    async def _connect(self) -> socket.socket:
        assert self._path is not None
        told = False
        while True:
            try:
                return fdsocket.connect(self._path)
            except OSError as error:
                if not told:
                    log.info("waiting for a front-end at %s: %s", self._path, error.strerror)
                    told = True
                await asyncio.sleep(RETRY_SECONDS)

    def _release(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
            if self._path is not None:
                Path(self._path).unlink(missing_ok=True)


def _counters(backend: VhostUserBackend) -> Counter[str]:
    counters = backend.session.counters.copy()
    counters["config_changes"] = backend.config.changes
    return counters
