# SPDX-License-Identifier: Apache-2.0
"""The keeper: it listens, stores descriptors and restarts workers; it reads no byte of a guest.

It never maps guest memory, never parses a message, and holds no lock that a worker can hold.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections import deque
from typing import TYPE_CHECKING, Any

import fdsocket
from vballoon.errors import UsageError
from vballoon.keeper import fault, handover
from vballoon.keeper.notifier import Notifier
from vballoon.keeper.notify import NotifyError
from vballoon.keeper.record import Record
from vballoon.keeper.store import Store
from vballoon.keeper.upstream import Upstream, split_name
from vballoon.keeper.vm import CONTROL, LISTEN, Vm
from vballoon.keeper.warming import WarmParent

if TYPE_CHECKING:
    from vballoon.keeper.listening import Listening
    from vballoon.keeper.spawn import Start

__all__ = ("Keeper", "serve")

log = logging.getLogger("vballoon.keeper")

OWNER, RECORD = "_", "record"
"""Owner and name of the keeper's own memfd in the store."""
HAND_OVER_SECONDS = 10.0
"""How long workers may take to end by themselves."""


def serve(
    machines: list[dict[str, Any]],
    listening: Listening,
    given: list[tuple[str, int]],
    **start: Any,
) -> int:
    """Keep workers for *machines* until the end; return the exit code.

    *given* are the descriptors of an earlier keeper, by full name; they are taken over.
    """
    fault.arm("")  # the deaths that a test plans are those of workers
    return asyncio.run(Keeper(listening, start).run(machines, given))


class Keeper:
    """See the module's docstring.  *start* holds options for every worker."""

    def __init__(self, listening: Listening, start: dict[str, Any]) -> None:
        self._listening, self._start_options = listening, start
        self.store = Store()
        self.upstream = Upstream(Notifier.from_environment())
        self.vms: dict[str, Vm] = {}
        self._record = Record()
        self._warm: WarmParent | None = None
        self._pending: deque[Vm] = deque()  # asked for, not started yet
        self._done: asyncio.Future[int] | None = None
        self._ending = False
        self._upgrading: asyncio.Task[None] | None = None

    async def run(self, machines: list[dict[str, Any]], given: list[tuple[str, int]]) -> int:
        """Serve until a signal, or until no machine is left."""
        loop = asyncio.get_running_loop()
        self._done = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.end)
        loop.add_signal_handler(signal.SIGUSR2, self.upgrade)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        self._take_back(given)
        self._warm_up()
        for options in machines:
            self.add(options)
        self._drop_unknown()
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
        vm = Vm(self._record.key_of(name), name, options, self, **self._start_options)
        self.vms[name] = vm
        connection = self._take_listener(vm, options)
        if "control" in options:
            vm.keep(CONTROL, self._listening.take(options["control"]).detach())
        log.info("serving %s", name)
        vm.start()
        if connection is not None:
            vm.connected(connection)
        vm.watch_front_end()
        return vm

    def _take_listener(self, vm: Vm, options: dict[str, Any]) -> int | None:
        """Store the socket on which front-ends connect; return a connection given instead."""
        if "fd" in options:
            if self.store.of(vm.key):
                return None  # an earlier keeper took it
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
        self._record.forget(vm.name)
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

    # -- an earlier and a later keeper ----------------------------------------------------------

    def _take_back(self, given: list[tuple[str, int]]) -> None:
        """Put what an earlier keeper stored into the store, and read its record."""
        for full, fd in given:
            parts = split_name(full)
            if parts is None:
                log.warning("a descriptor named %s was given; it is closed", full)
                fdsocket.close_fds([fd])
                continue
            try:
                self.store.add(*parts, [fd])
            except NotifyError as error:
                log.warning("a descriptor named %s was given; it is closed: %s", full, error)
        kept = self.store.get(OWNER, RECORD)
        self._record = Record(os.dup(kept) if kept is not None else None)
        if kept is None:
            self.store.add(OWNER, RECORD, [os.dup(self._record.fd)])
            self.upstream.store(OWNER, RECORD, [self._record.fd])

    def _drop_unknown(self) -> None:
        """Let go of machines that the configuration no longer names."""
        known = {OWNER, *(vm.key for vm in self.vms.values())}
        for owner in set(self.store.owners()) - known:
            log.warning("a machine that is no longer configured loses its balloon")
            for name in self.store.discard(owner):
                self.upstream.remove(owner, name)

    def _hang_up(self) -> None:
        log.warning("SIGHUP: the configuration is not read again; nothing has changed")

    def upgrade(self) -> None:
        """Handle SIGUSR2: replace this program by the one that is installed now."""
        if self._ending or self._upgrading is not None:
            return
        losing = [vm.name for vm in self.vms.values() if not vm.survives_worker]
        if losing:
            log.error(
                "upgrade refused: a vfio-user connection ends with its worker; remove first: %s",
                ", ".join(losing),
            )
            return
        self._upgrading = asyncio.get_running_loop().create_task(self._upgrade())

    async def _upgrade(self) -> None:
        try:
            await self._replace()
        finally:
            self._upgrading = None

    async def _replace(self) -> None:
        """Run the installed program in this process, unless it does not start."""
        check = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "vballoon.keeper.warm", "--check", stdin=subprocess.DEVNULL
        )
        if await check.wait():
            log.error("upgrade refused: the installed program does not start")
            return
        log.info("upgrade: handing over to the installed program")
        await self._hand_over()
        try:
            handover.replace(self.store)
        except OSError as error:
            log.error("upgrade: exec failed: %s; this program continues", error.strerror)
        self._ending = False
        self._warm_up()
        for vm in self.vms.values():
            vm.restart()

    async def _hand_over(self) -> None:
        """Let every worker end between two messages; everything stays in the store."""
        self._ending = True
        loop = asyncio.get_running_loop()
        ends = []
        for vm in self.vms.values():
            ended = loop.create_future()
            ends.append(ended)
            vm.hand_over(lambda ended=ended: ended.done() or ended.set_result(None))  # type: ignore[misc]
        if ends:
            _, late = await asyncio.wait(ends, timeout=HAND_OVER_SECONDS)
            if late:
                self._force()
                await asyncio.wait(late, timeout=HAND_OVER_SECONDS)
        if self._warm is not None:
            self._warm.close()
            self._warm = None

    async def _leave_to_systemd(self) -> None:
        await self._hand_over()
        self._listening.keep_files()
        self._finish(0)

    # -- the end --------------------------------------------------------------------------------

    def end(self) -> None:
        """Handle SIGTERM and SIGINT."""
        if self._ending:
            return
        if self.upstream.keeps:
            log.info("everything stays in the store of systemd")
            asyncio.get_running_loop().create_task(self._leave_to_systemd())
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
