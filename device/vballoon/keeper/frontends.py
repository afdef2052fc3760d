# SPDX-License-Identifier: Apache-2.0
"""A worker's vhost-user transport: connections that outlive this process.

Every message is handled atomically (:mod:`vballoon.keeper.stream`).  Where the front-end negotiates
no in-flight area, as QEMU's test device does not, the worker keeps a record of its own.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from vballoon.keeper.holder import peer_pid
from vballoon.keeper.stream import MessageStream, Progress
from vballoon.vhost_user.backend import VhostUserBackend
from vballoon.vhost_user.packing import pack, unpack
from vballoon.vhost_user.shell import Connection
from vballoon.virtio import TransportEvents, TransportStatus
from virtio_formats.vhost_user import MAX_PAYLOAD, VhostUserHeader

if TYPE_CHECKING:
    import asyncio
    import socket

    from fdsocket import Receiver
    from vballoon.keeper.answers import AnswerFile
    from vballoon.keeper.features import Offered
    from vballoon.vhost_user.io import Io
    from vballoon.virtio import VirtioDevice
    from vballoon.virtqueue import Engine

__all__ = ("Continued", "Frontends", "Recorder")

log = logging.getLogger(__name__)


class Recorder(Protocol):
    """Records the state for the next process."""

    def record(self, progress: Progress) -> None:
        """Store the descriptors, then the state, with the *progress* of the current message."""

    def settle(self) -> None:
        """Drop the descriptors that the state no longer names."""


class _Framing:
    header = VhostUserHeader.SIZE

    def total(self, header: bytes) -> int:
        """Return the size of a message; a payload that is too long is refused by its header."""
        size = VhostUserHeader.parse(header).size
        return self.header + (size if size <= MAX_PAYLOAD else 0)


class Continued:
    """What an earlier worker left of a connection.

    *state* is packed; *fds*, by slot, are taken over.
    """

    def __init__(self, state: bytes, fds: dict[int, int], progress: Progress) -> None:
        self.state, self.fds, self.progress = state, fds, progress


class _Backend(VhostUserBackend):
    """A back-end that reports when the device's registers change."""

    def __init__(
        self, changed: Callable[[], None], device: VirtioDevice, io: Io, **more: Any
    ) -> None:
        self._changed = changed
        super().__init__(device, io, **more)

    def config_changed(self) -> None:
        """Implement :meth:`vballoon.virtio.Transport.config_changed`, and report the change."""
        self._changed()
        super().config_changed()


class Frontends:
    """Serves *device* to one front-end at a time; *ended* is called when it has disconnected."""

    def __init__(
        self,
        device: VirtioDevice,
        features: Offered,
        events: TransportEvents,
        names: dict[int, str],
        answers: AnswerFile,
        recorder: Recorder,
        ended: Callable[[str], None],
        *,
        engine: Engine = "batch",
        quiet: bool = False,
    ) -> None:
        self._device, self._features, self._events, self._names = device, features, events, names
        self._answers, self._recorder, self._ended = answers, recorder, ended
        self._engine, self._quiet = engine, quiet
        self._connection: Connection | None = None
        self._counters: Counter[str] = Counter()
        self._peer = 0

    @property
    def backend(self) -> VhostUserBackend | None:
        """The back-end of the connected front-end."""
        return self._connection.backend if self._connection else None

    def status(self) -> TransportStatus:
        """Return the status of the connection, the features and the queues."""
        counters = self._counters.copy()
        if self.backend is None:
            return TransportStatus(connected=False, counters=dict(counters))
        counters.update(_counters(self.backend))
        return replace(self.backend.status(counters, self._names), peer_pid=self._peer)

    def state(self) -> tuple[bytes, dict[int, int]]:
        """Return the packed state of the connection, and its descriptors by slot."""
        if self.backend is None:
            return b"", {}
        state, fds = self.backend.state()
        return pack(state), fds

    def config_changed(self) -> None:
        """Have the driver read the configuration again."""
        if self.backend is not None:
            self.backend.config_changed()

    @property
    def progress(self) -> Progress:
        """The message that was committed last."""
        stream = self._connection.stream if self._connection else None
        return stream.progress if isinstance(stream, MessageStream) else Progress()

    def serve(self, sock: socket.socket, before: Continued | None = None) -> None:
        """Serve the front-end on *sock*, as *before* says if an earlier worker has begun.

        Raise :class:`~vballoon.errors.ProtocolError` where that cannot be continued.
        """

        def make_stream(sock: socket.socket, receiver: Receiver) -> MessageStream:
            return MessageStream(
                sock,
                receiver,
                _Framing(),
                self._answers,
                self._recorder.record,
                settled=self._recorder.settle,
                progress=before.progress if before else None,
            )

        def make_backend(connection: Connection) -> VhostUserBackend:
            return self._make_backend(connection, before)

        self._peer = peer_pid(sock)
        self._connection = connection = Connection(sock, make_backend, make_stream)
        connection.ended.add_done_callback(self._gone)
        if before is None:
            log.info("front-end connected")
            self._events.frontend_connected()
        else:
            log.info("continuing with the connected front-end")

    def _make_backend(self, connection: Connection, before: Continued | None) -> VhostUserBackend:
        device = self._device
        backend = _Backend(
            self._changed,
            device,
            connection,
            ring_features=self._features.ring,
            events=self._events,
            engine=self._engine,
            own_record=True,
        )
        backend.rings.held = self._quiet
        if before is not None:
            # The rings are served before the next message is read.
            backend.restore(unpack(before.state), before.fds)
        return backend

    def _changed(self) -> None:
        """Record changed registers, except within a message, which is recorded with them."""
        stream = self._connection.stream if self._connection else None
        if isinstance(stream, MessageStream) and not stream.handling:
            self._recorder.record(stream.progress)

    def _gone(self, ended: asyncio.Future[str]) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._counters.update(_counters(connection.backend))
        reason = ended.result()
        log.info("front-end disconnected%s", f": {reason}" if reason else "")
        self._events.frontend_disconnected(reason)
        self._ended(reason)

    def drop_silent(self) -> None:
        """Close the connection of a front-end that has sent nothing while another one waits."""
        if self.backend is not None and not self.backend.session.counters:
            log.warning("process %d has sent no message: disconnected", self._peer)
            self.close()

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()


def _counters(backend: VhostUserBackend) -> Counter[str]:
    counters = backend.session.counters.copy()
    counters["config_changes"] = backend.config.changes
    return counters
