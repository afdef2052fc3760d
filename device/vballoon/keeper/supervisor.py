# SPDX-License-Identifier: Apache-2.0
"""The keeper: it listens, stores descriptors and restarts workers; it reads no byte of a guest.

It never maps guest memory, never parses a message, and holds no lock that a worker can hold.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections import deque
from typing import TYPE_CHECKING, Any

import fdsocket
from vballoon.errors import UsageError
from vballoon.keeper.notifier import Notifier
from vballoon.keeper.store import Store
from vballoon.keeper.upstream import Upstream
from vballoon.keeper.vm import CONTROL, LISTEN, Vm
from vballoon.keeper.warming import WarmParent

if TYPE_CHECKING:
    from vballoon.keeper.listening import Listening
    from vballoon.keeper.spawn import Start

__all__ = ("Keeper", "serve")

log = logging.getLogger("vballoon.keeper")

HAND_OVER_SECONDS = 10.0
"""How long workers may take to end by themselves."""


def serve(machines: list[dict[str, Any]], listening: Listening, **start: Any) -> int:
    """Keep workers for *machines* until the end; return the exit code."""
    return asyncio.run(Keeper(listening, start).run(machines))


class Keeper:
    """See the module's docstring.  *start* holds options for every worker."""

    def __init__(self, listening: Listening, start: dict[str, Any]) -> None:
        self._listening, self._start_options = listening, start
        self.store = Store()
        self.upstream = Upstream(Notifier.from_environment())
        self.vms: dict[str, Vm] = {}
        self._next_key = 0
        self._warm: WarmParent | None = None
        self._pending: deque[Vm] = deque()  # asked for, not started yet
        self._done: asyncio.Future[int] | None = None
        self._ending = False

    async def run(self, machines: list[dict[str, Any]]) -> int:
        """Serve until a signal, or until no machine is left."""
        loop = asyncio.get_running_loop()
        self._done = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.end)
        self._warm_up()
        for options in machines:
            self.add(options)
        self.upstream.send(b"READY=1")
        try:
            return await self._done
        finally:
            if self._warm is not None:
                self._warm.close()

    # -- machines -------------------------------------------------------------------------------

    def add(self, options: dict[str, Any]) -> Vm:
        """Serve a machine more; its sockets listen already."""
        name = name_of(options)
        vm = Vm(_key(self._next_key), name, options, self, **self._start_options)
        self._next_key += 1
        self.vms[name] = vm
        if "control" in options:
            vm.keep(CONTROL, self._listening.take(options["control"]).detach())
        connection = self._take_listener(vm, options)
        log.info("serving %s", name)
        vm.start()
        if connection is not None:
            vm.connected(connection)
        vm.watch_front_end()
        return vm

    def _take_listener(self, vm: Vm, options: dict[str, Any]) -> int | None:
        """Store the socket on which front-ends connect; return a connection given instead."""
        if "fd" in options:
            try:
                sock = fdsocket.adopt(options["fd"])
            except OSError as error:
                raise UsageError(error.strerror or str(error)) from None
            if not fdsocket.is_listening(sock):
                return sock.detach()
            vm.keep(LISTEN, sock.detach())
        elif not options.get("client"):
            path = options.get("vhost-user") or options["vfio-user"]
            vm.keep(LISTEN, self._listening.take(path).detach())
        return None

    def ended(self, vm: Vm) -> None:
        """See :class:`~vballoon.keeper.vm.Services`."""
        self.vms.pop(vm.name, None)
        log.info("%s: no longer served", vm.name)
        if not self.vms:
            self._finish(0)

    def changed(self, vm: Vm) -> None:
        """See :class:`~vballoon.keeper.vm.Services`."""

    def _finish(self, code: int) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(code)

    # -- workers --------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        self._warm = WarmParent(self._started, self._exited, self._warm_gone)

    def spawn(self, vm: Vm, start: Start, fds: list[int]) -> None:
        """See :class:`~vballoon.keeper.vm.Services`."""
        self._pending.append(vm)
        if self._warm is not None:
            try:
                self._warm.start(start, fds)
            except OSError as error:
                log.error("%s: cannot ask for a worker: %s", vm.name, error.strerror)

    def _started(self, pid: int, pidfd: int) -> None:
        vm = self._pending.popleft()
        if vm.name in self.vms:
            vm.started(pid, pidfd)
        else:  # removed meanwhile
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            fdsocket.close_fds([pidfd])

    def _exited(self, pid: int, code: int) -> None:
        vm = next((vm for vm in self.vms.values() if vm.pid == pid), None)
        if code:
            what = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
            log.warning("%s: worker %d ended with %s", vm.name if vm else "?", pid, what)

    def _warm_gone(self) -> None:
        if self._ending:
            return
        log.error("the warm parent ended; it is started again")
        lost, self._pending = self._pending, deque()
        self._warm_up()
        for vm in lost:
            vm.start()

    # -- the end --------------------------------------------------------------------------------

    def end(self) -> None:
        """Handle SIGTERM and SIGINT."""
        if self._ending:
            return
        self._ending = True
        attached = [vm.name for vm in self.vms.values() if vm.attached]
        if attached:
            log.warning("front-ends lose their balloon: %s", ", ".join(attached))
        for vm in list(self.vms.values()):
            vm.remove()
        asyncio.get_running_loop().call_later(HAND_OVER_SECONDS, self._force)

    def _force(self) -> None:
        for vm in list(self.vms.values()):
            log.error("%s: the worker does not end", vm.name)
            vm.kill()


def name_of(options: dict[str, Any]) -> str:
    """Return the name of a machine: the one given, or where it is served."""
    for key in ("name", "vhost-user", "vfio-user"):
        if options.get(key):
            return str(options[key])
    return f"fd {options['fd']}"


def _key(number: int) -> str:
    """Return a short owner key: names of all machines must fit into one environment string."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    key = ""
    while True:
        number, digit = divmod(number, 36)
        key = digits[digit] + key
        if not number:
            return key
