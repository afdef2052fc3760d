# SPDX-License-Identifier: Apache-2.0
"""The two transports with one face: run, close, and what they are doing."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Protocol

from vballoon.vhost_user import BackendEvents, VhostUserServer
from vballoon.vhost_user.status import BackendStatus, QueueStatus, RegionStatus, feature_names
from vballoon.virtio_pci import VirtioPciFunction
from vfio_user import Server

if TYPE_CHECKING:
    from collections.abc import Callable

    from vballoon.keeper.features import Offered
    from vballoon.virtio import VirtioDevice
    from vballoon.virtqueue import Engine

    Emit = Callable[[str, dict[str, Any]], None]

__all__ = ("ServedTransport", "VfioUser", "VhostUser")


class ServedTransport(Protocol):
    """What a machine needs of its transport."""

    def status(self) -> BackendStatus:
        """What is connected, negotiated and running."""

    async def run(self) -> None:
        """Serve until closed, or until an inherited connection has ended."""

    def close(self) -> None:
        """Let the front-end go and stop serving; safe to call again."""


class _Events(BackendEvents):
    """What happens on a vhost-user connection, as events of the control socket."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit

    def frontend_connected(self) -> None:
        self._emit("FRONTEND_CONNECTED", {})

    def frontend_disconnected(self, reason: str) -> None:
        self._emit("FRONTEND_DISCONNECTED", {"reason": reason})

    def queue_broken(self, index: int, rule: str, detail: str) -> None:
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
            events=_Events(emit),
            device_names=names,
            engine=engine,
        )
        self.open()

    async def run(self) -> None:
        """Serve front-ends, one after the other."""
        await self.serve()


class _Function(VirtioPciFunction):
    """The PCI function, which tells of its clients."""

    def __init__(
        self,
        device: VirtioDevice,
        ring: int,
        emit: Emit,
        engine: Engine,
        msix: bool,
    ) -> None:
        super().__init__(
            device,
            ring_features=ring,
            engine=engine,
            msix=msix,
            on_queue_broken=lambda index, rule, detail: emit(
                "QUEUE_BROKEN", {"queue": index, "rule": rule, "detail": detail}
            ),
        )
        self._emit = emit

    def attached(self) -> None:
        super().attached()
        self._emit("FRONTEND_CONNECTED", {})

    def detached(self) -> None:
        super().detached()
        self._emit("FRONTEND_DISCONNECTED", {"reason": self.client_error or ""})


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
        self._function = _Function(device, features.pci_ring, emit, engine, msix)
        self._server = Server(self._function, sock)
        self._names = names

    def status(self) -> BackendStatus:
        """The same form as vhost-user's."""
        function = self._function
        return BackendStatus(
            transport="vfio-user",
            connected=self._server.connection is not None,
            features=feature_names(function.features, self._names),
            queues=[self._queue(index) for index in range(len(function.registers.queues))],
            regions=[
                RegionStatus(r.guest_phys_addr, r.size, r.page_size)
                for r in function.memory.regions
            ],
        )

    def _queue(self, index: int) -> QueueStatus:
        registers = self._function.registers.queues[index]
        queue = self._function.rings.queues.get(index)
        broken = self._function.rings.broken.get(index)
        if queue is None:
            state = "broken" if broken else "disabled" if registers.enable else "stopped"
            rule = broken.rule if broken else None
            return QueueStatus(index, state, registers.size * registers.enable, rule)
        return QueueStatus(
            index=index,
            state="broken" if queue.broken else "running",
            size=registers.size,
            broken=queue.broken.rule if queue.broken else None,
            outstanding=queue.ring.outstanding,
            taken=queue.taken,
            given=queue.given,
            kicked=queue.kicked,
            notified=queue.notified,
        )

    async def run(self) -> None:
        """Serve clients, one after the other."""
        await self._server.serve()

    def close(self) -> None:
        """Let the client go and stop serving."""
        self._server.close()
