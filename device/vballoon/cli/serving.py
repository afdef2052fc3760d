# SPDX-License-Identifier: Apache-2.0
"""The running server: for each machine a balloon, its transport and its control socket."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import tomllib
from typing import TYPE_CHECKING, Any

from vballoon.balloon import Balloon
from vballoon.cli.features import device_names, parse_features
from vballoon.control.operator import Operator
from vballoon.control.server import ControlServer
from vballoon.errors import UsageError
from vballoon.vhost_user import BackendEvents, VhostUserServer

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ("read_config", "serve", "set_up_logging")

log = logging.getLogger("vballoon.serve")

_KINDS: dict[str, type] = {
    "vhost-user": str,
    "vfio-user": str,
    "fd": int,
    "control": str,
    "client": bool,
    "no-discard": bool,
    "features": str,
}
_WHERE = ("vhost-user", "vfio-user", "fd")


class _OneLine(logging.Formatter):
    """One record, one line: whatever a peer sends ends up escaped, and tracebacks joined."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\r", "\\r").replace("\n", " | ")


def set_up_logging(level: str) -> None:
    """Log to standard error: time, level, room, message."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def read_config(path: Path) -> list[dict[str, Any]]:
    """The ``[[vm]]`` tables of the TOML file *path*; raises :class:`UsageError`."""
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    machines = data.get("vm")
    if set(data) != {"vm"} or not isinstance(machines, list) or not machines:
        raise UsageError(f"{path}: [[vm]] tables are expected, and nothing else")
    for number, machine in enumerate(machines, start=1):
        _check_machine(f"{path}: vm {number}", machine)
    return machines


def _check_machine(where: str, machine: dict[str, Any]) -> None:
    for key, value in machine.items():
        if key not in _KINDS:
            raise UsageError(f"{where}: unknown key {key!r}; known: {', '.join(_KINDS)}")
        if type(value) is not _KINDS[key]:
            raise UsageError(f"{where}: {key} must be of type {_KINDS[key].__name__}")
    if sum(key in machine for key in _WHERE) != 1:
        raise UsageError(f"{where}: exactly one of {', '.join(_WHERE)} is needed")


def serve(machines: list[dict[str, Any]]) -> int:
    """Serve all *machines* until SIGTERM, SIGINT or ``quit``; returns the exit code."""
    return asyncio.run(_serve(machines))


async def _serve(machines: list[dict[str, Any]]) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    served: list[Machine] = []
    try:
        for options in machines:
            served.append(Machine(options, stop))
            served[-1].open()
        tasks = [asyncio.create_task(machine.run()) for machine in served]
        told = asyncio.create_task(stop.wait())
        # one machine's end (an inherited connection, a fault) does not end the others
        while not told.done() and not all(task.done() for task in tasks):
            running = [task for task in tasks if not task.done()]
            await asyncio.wait([told, *running], return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        for machine in served:
            machine.close()
        await asyncio.gather(*tasks)
    finally:
        for machine in served:
            machine.close()
    return 0


class _Events(BackendEvents):
    """What happens on the transport, as events of the control socket."""

    def __init__(self, control: ControlServer) -> None:
        self._control = control

    def frontend_connected(self) -> None:
        self._control.event("FRONTEND_CONNECTED", {})

    def frontend_disconnected(self, reason: str) -> None:
        self._control.event("FRONTEND_DISCONNECTED", {"reason": reason})

    def queue_broken(self, index: int, rule: str, detail: str) -> None:
        self._control.event("QUEUE_BROKEN", {"queue": index, "rule": rule, "detail": detail})


class Machine:
    """One balloon and everything around it.  *options* are as in a ``[[vm]]`` table."""

    def __init__(self, options: dict[str, Any], stop: asyncio.Event) -> None:
        features = parse_features(options.get("features", ""))
        self._options = options
        self._control_path = options.get("control")
        self.balloon = Balloon(features.device, discard=not options.get("no-discard", False))
        operator = Operator(self.balloon, self, stop=stop.set)
        self.control = ControlServer(operator)
        if "vfio-user" in options:
            raise UsageError("vfio-user is not served by this version")
        self.server = VhostUserServer(
            self.balloon,
            path=options.get("vhost-user"),
            fd=options.get("fd"),
            client=options.get("client", False),
            ring_features=features.ring,
            events=_Events(self.control),
            device_names=device_names(),
        )

    def status(self) -> Any:
        """The transport's state."""
        return self.server.status()

    def open(self) -> None:
        """Make both sockets ready."""
        if self._control_path is not None:
            try:
                self.control.start(self._control_path)
            except OSError as error:
                raise UsageError(f"{self._control_path}: {error.strerror or error}") from None
        self.server.open()
        where = self._options.get("vhost-user") or f"descriptor {self._options.get('fd')}"
        control = f", control socket {self._control_path}" if self._control_path else ""
        log.info("vhost-user on %s%s", where, control)

    async def run(self) -> None:
        """Serve front-ends until closed."""
        try:
            await self.server.serve()
        except asyncio.CancelledError:
            pass

    def close(self) -> None:
        """Let go of everything; safe to call again."""
        self.server.close()
        self.control.close()
