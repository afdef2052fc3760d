# SPDX-License-Identifier: Apache-2.0
"""Both transports with one interface: run, close, and their status."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Protocol

from vballoon.vhost_user import VhostUserServer
from vballoon.virtio import TransportEvents, TransportStatus, feature_names, region_statuses
from vballoon.virtio_pci import VirtioPciFunction
from vfio_user import Server

if TYPE_CHECKING:
    from collections.abc import Callable

    from vballoon.keeper.features import Offered
    from vballoon.virtio import VirtioDevice
    from vballoon.virtqueue import Engine

    Emit = Callable[[str, dict[str, Any]], None]

__all__ = ("Events", "ServedTransport", "VfioUser", "VhostUser")


class ServedTransport(Protocol):
    """The interface of a transport that a machine uses."""

    def status(self) -> TransportStatus:
        """Return the status of the connection, the features and the queues."""

    async def run(self) -> None:
        """Serve until closed, or until an inherited connection has ended."""

    def close(self) -> None:
        """Disconnect the front-end and stop serving; safe to call again."""


class Events(TransportEvents):
    """Emits the events of a transport on the control socket."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit

    def frontend_connected(self) -> None:
        """Emit FRONTEND_CONNECTED."""
        self._emit("FRONTEND_CONNECTED", {})

    def frontend_disconnected(self, reason: str) -> None:
        """Emit FRONTEND_DISCONNECTED."""
        self._emit("FRONTEND_DISCONNECTED", {"reason": reason})

    def queue_broken(self, index: int, rule: str, detail: str) -> None:
        """Emit QUEUE_BROKEN."""
        self._emit("QUEUE_BROKEN", {"queue": index, "rule": rule, "detail": detail})


class VhostUser(VhostUserServer):
    """vhost-user on *sock* (listening or connected), or connecting to *path* as a client."""

    def __init__(
        self,
        device: VirtioDevice,
        features: Offered,
        emit: Emit,
        names: dict[int, str],
        *,
        sock: socket.socket | None = None,
        path: str | None = None,
        engine: Engine = "batch",
    ) -> None:
        super().__init__(
            device,
            path=path,
            fd=sock.detach() if sock is not None else None,
            client=sock is None,
            ring_features=features.ring,
            events=Events(emit),
            device_names=names,
            engine=engine,
        )
        self.open()

    async def run(self) -> None:
        """Serve front-ends, one after the other."""
        await self.serve()


class VfioUser:
    """vfio-user on the listening socket *sock*."""

    def __init__(
        self,
        device: VirtioDevice,
        features: Offered,
        emit: Emit,
        names: dict[int, str],
        *,
        sock: socket.socket,
        engine: Engine = "batch",
        msix: bool = True,
    ) -> None:
        self._function = VirtioPciFunction(
            device,
            ring_features=features.pci_ring,
            engine=engine,
            msix=msix,
            events=Events(emit),
        )
        self._server = Server(self._function, sock)
        self._names = names

    def status(self) -> TransportStatus:
        """Return the status in the same form as vhost-user's."""
        function = self._function
        return TransportStatus(
            transport="vfio-user",
            connected=self._server.connection is not None,
            features=feature_names(function.features, self._names),
            queues=function.queue_statuses(),
            regions=region_statuses(function.memory),
            memory_unmapped=function.client_memory.unmapped,
        )

    async def run(self) -> None:
        """Serve clients, one after the other."""
        await self._server.serve()

    def close(self) -> None:
        """Disconnect the client and stop serving."""
        self._server.close()
