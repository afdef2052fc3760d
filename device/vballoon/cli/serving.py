# SPDX-License-Identifier: Apache-2.0
"""The running server: a balloon, a transport and a control socket for each machine."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import TYPE_CHECKING, Any

import fdsocket
from vballoon.balloon import Balloon
from vballoon.control.operator import Operator
from vballoon.control.server import ControlServer
from vballoon.errors import UsageError
from vballoon.keeper.config import WHERE
from vballoon.keeper.features import device_names, parse_features
from vballoon.keeper.transports import VfioUser, VhostUser
from vballoon.sizes import parse_limits

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from vballoon.keeper.features import Offered
    from vballoon.keeper.listening import Listening
    from vballoon.keeper.transports import ServedTransport
    from vballoon.virtio import TransportStatus

__all__ = ("serve",)

log = logging.getLogger("vballoon.serve")


def serve(machines: list[dict[str, Any]], listening: Listening) -> int:
    """Serve all *machines* until SIGTERM, SIGINT or ``quit``; return the exit code."""
    return asyncio.run(_serve(machines, listening))


async def _serve(machines: list[dict[str, Any]], listening: Listening) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    served: list[Machine] = []
    try:
        for options in machines:
            served.append(Machine(options, listening, stop.set))
        tasks = [asyncio.create_task(machine.run()) for machine in served]
        stopping = asyncio.create_task(stop.wait())
        # one machine's end (an inherited connection, a fault) leaves the others running
        while not stopping.done() and not all(task.done() for task in tasks):
            running = [task for task in tasks if not task.done()]
            await asyncio.wait([stopping, *running], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        for machine in served:
            machine.close()
        await asyncio.gather(*tasks)
    finally:
        for machine in served:
            machine.close()
    return 0


class Machine:
    """One balloon, its transport and its control socket; *options* are a ``[[vm]]`` table."""

    def __init__(
        self, options: dict[str, Any], listening: Listening, stop: Callable[[], None]
    ) -> None:
        features = parse_features(options.get("features", ""))
        balloon = Balloon(
            features.device,
            discard=not options.get("no-discard", False),
            limits=parse_limits(options),
        )
        self._operator = Operator(balloon, self, stop=stop)
        self._control = ControlServer(self._operator)
        self._transport = _transport(options, listening, features, balloon, self._control.event)
        if "control" in options:
            self._control.start(listening.take(options["control"]))
        where = (f"{key} {options[key]}" for key in (*WHERE, "control") if key in options)
        log.info("serving %s", ", ".join(where))

    def status(self) -> TransportStatus:
        """Return the state of the transport."""
        return self._transport.status()

    async def run(self) -> None:
        """Serve front-ends until closed."""
        try:
            await self._transport.run()
        except asyncio.CancelledError:
            pass

    def close(self) -> None:
        """Close the transport and the control socket; may be called again."""
        self._transport.close()
        self._control.close()


def _transport(
    options: dict[str, Any],
    listening: Listening,
    features: Offered,
    balloon: Balloon,
    emit: Callable[[str, dict[str, Any]], None],
) -> ServedTransport:
    names = device_names()
    engine = options.get("engine", "batch")
    if "vfio-user" in options:
        sock = listening.take(options["vfio-user"])
        msix = not options.get("no-msix", False)
        return VfioUser(balloon, features, emit, names, sock=sock, engine=engine, msix=msix)
    if options.get("client"):
        path = options["vhost-user"]
        return VhostUser(balloon, features, emit, names, path=path, engine=engine)
    sock = _adopt(options["fd"]) if "fd" in options else listening.take(options["vhost-user"])
    return VhostUser(balloon, features, emit, names, sock=sock, engine=engine)


def _adopt(number: int) -> socket.socket:
    try:
        return fdsocket.adopt(number)
    except OSError as error:
        raise UsageError(error.strerror or str(error)) from None
