# SPDX-License-Identifier: Apache-2.0
"""One machine as the keeper sees it: its descriptors, its worker, and how often that has died.

The keeper accepts the connections, so that no death of a worker can lose one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import fdsocket
from fdsocket import close_fds
from vballoon.keeper import holder
from vballoon.keeper.notify import DATAGRAM_MAX, Notification, NotifyError, parse
from vballoon.keeper.spawn import Start

if TYPE_CHECKING:
    from collections.abc import Callable

    from vballoon.keeper.store import Store
    from vballoon.keeper.upstream import Upstream

__all__ = ("CRASHES_MAX", "CRASH_SECONDS", "Services", "Vm")

log = logging.getLogger("vballoon.keeper")

CRASHES_MAX, CRASH_SECONDS = 5, 60.0
"""So many deaths in so many seconds: the next worker serves no ring; after as many more, none."""
DATAGRAMS_PER_WAKEUP = 64
RETRY_SECONDS = 0.5
"""Between two attempts to connect to a front-end that listens (``client``)."""
WATCHDOG_SECONDS = 10.0
LISTEN, CONTROL, CONNECTION = "listen", "control", "c"


class Services(Protocol):
    """What a machine needs of the keeper."""

    store: Store
    upstream: Upstream

    def spawn(self, vm: Vm, start: Start, fds: list[int]) -> None:
        """Ask for a worker; :meth:`Vm.started` follows."""

    def ended(self, vm: Vm) -> None:
        """Handle the end of *vm*, which has let go of everything."""

    def changed(self, vm: Vm) -> None:
        """Handle a change of the state of *vm*."""


class Vm:
    """The machine *name*, whose descriptors have the owner *key*; *options* as in ``[[vm]]``."""

    def __init__(
        self,
        key: str,
        name: str,
        options: dict[str, Any],
        services: Services,
        *,
        restart_limit: int = CRASHES_MAX,
        **start: Any,
    ) -> None:
        self.key, self.name, self.options = key, name, options
        self._services, self._start_options = services, start
        self._restart_limit = restart_limit
        self.state = "stopped"
        """``starting``, ``running``, ``quiet`` (no ring is served), ``failed``, ``stopped``."""
        self.status = ""
        self.pid = 0
        self.restarts = 0
        self._pidfd = -1
        self._notify: socket.socket | None = None
        self._crashes: deque[float] = deque()
        self._quiet = False
        self._stopping = self._handing_over = self._discarding = False
        self._watchdog: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._waiting: Callable[[], None] | None = None
        self._accepting = self._contended = False
        self._connections = 0

    # -- descriptors ----------------------------------------------------------------------------

    def _names(self) -> list[str]:
        return [name for name, _ in self._services.store.of(self.key)]

    @property
    def attached(self) -> bool:
        """Whether a front-end is connected."""
        return any(_is_connection(name) for name in self._names())

    @property
    def _accepts_itself(self) -> bool:
        """Whether the worker accepts front-ends, whose connections then end with it (vfio-user)."""
        return "vfio-user" in self.options

    @property
    def survives_worker(self) -> bool:
        """Whether a new worker continues the front-end's connection."""
        return not self._accepts_itself

    def keep(self, name: str, fd: int) -> None:
        """Store *fd* (taken over) here and above."""
        new = self._services.store.add(self.key, name, [fd])
        self._services.upstream.store(self.key, name, new)

    def _remove(self, name: str) -> None:
        self._services.store.remove(self.key, name)
        self._services.upstream.remove(self.key, name)

    def watch_front_end(self) -> None:
        """Accept the next front-end once none is connected."""
        listener = self._services.store.get(self.key, LISTEN)
        free = not (self.attached or self._discarding or self._accepts_itself)
        loop = asyncio.get_running_loop()
        if listener is None:
            if free and self.options.get("client") and self._retry is None:
                self._connect()
        elif free and not self._accepting:
            loop.add_reader(listener, self._accept, listener)
        elif not free and self._accepting:
            loop.remove_reader(listener)
        self._accepting = free and listener is not None

    def _accept(self, listener: int) -> None:
        sock = socket.socket(fileno=os.dup(listener))
        try:
            connection, _ = sock.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.error("%s: cannot accept a front-end: %s", self.name, error.strerror)
            return
        finally:
            sock.close()
        self.connected(connection.detach())

    def _connect(self) -> None:
        self._retry = None
        try:
            sock = fdsocket.connect(self.options["vhost-user"])
        except OSError:
            self._retry = asyncio.get_running_loop().call_later(RETRY_SECONDS, self._connect)
            return
        self.connected(sock.detach())

    def connected(self, fd: int) -> None:
        """Store a connection (taken over), then give it to the worker."""
        taken = {name for name in self._names() if _is_connection(name)}
        self._connections += 1
        while f"{CONNECTION}{self._connections}" in taken:
            self._connections += 1
        name = f"{CONNECTION}{self._connections}"
        self.keep(name, fd)
        self.watch_front_end()
        self._services.upstream.barrier(lambda: self._hand_over_connection(name))

    def _hand_over_connection(self, name: str) -> None:
        fd = self._services.store.get(self.key, name)
        if fd is None or self._notify is None or self.state not in ("running", "quiet"):
            return  # the next worker gets it with everything else
        try:
            fdsocket.send_some(self._notify, f"FDNAME={name}".encode(), [fd])
        except OSError as error:  # it has just died: the next worker gets the connection
            log.debug("%s: connection: %s", self.name, error.strerror)

    # -- the worker -----------------------------------------------------------------------------

    def start(self) -> None:
        """Start a worker with everything that is stored."""
        self._drain()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setblocking(False)
        self._notify = ours
        kept = self._services.store.of(self.key)
        if not self._accepts_itself:
            kept = [entry for entry in kept if entry[0] != LISTEN]
        start = Start(
            name=self.name,
            options=self.options,
            names=[name for name, _ in kept],
            quiet=self._quiet,
            **self._start_options,
        )
        self._set_state("starting")
        try:
            self._services.spawn(self, start, [theirs.fileno(), *(fd for _, fd in kept)])
        finally:
            theirs.close()

    def started(self, pid: int, pidfd: int) -> None:
        """Watch the worker *pid*, which has been forked; *pidfd* is taken over."""
        self.pid, self._pidfd = pid, pidfd
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, self._died)
        if self._notify is not None:
            loop.add_reader(self._notify, self._read)
        self._feed_watchdog()

    def _died(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        close_fds([self._pidfd])
        pid, self.pid, self._pidfd = self.pid, 0, -1
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._drain()
        if self._handing_over or self._discarding:
            self._set_state("stopped")
        elif self._stopping:
            self._discarding = True
            self._set_state("stopped")
        else:
            self._crashed(pid)
            return
        waiting, self._waiting = self._waiting, None
        if self._discarding:
            self.discard()
        if waiting is not None:
            waiting()

    def _crashed(self, pid: int) -> None:
        now = time.monotonic()
        self._crashes.append(now)
        while now - self._crashes[0] > CRASH_SECONDS:
            self._crashes.popleft()
        self.restarts += 1
        if len(self._crashes) < self._restart_limit:
            log.warning("%s: worker %d died; it is started again", self.name, pid)
            self.start()
            return
        self._crashes.clear()
        if not self._quiet:
            self._quiet = True
            log.error(
                "%s: the worker died %d times in %d s; its rings stay stopped until "
                "'restart' or a new front-end",
                self.name, self._restart_limit, CRASH_SECONDS,
            )  # fmt: skip
            self.start()
            return
        log.error("%s: the worker dies even without serving a ring; none is started", self.name)
        self._set_state("failed")

    def restart(self) -> None:
        """Serve the rings again, with a new worker; a running one hands over first."""
        self._quiet = False
        self._crashes.clear()
        if self.pid:
            self.hand_over(self._resume)
        else:
            self._resume()

    def _resume(self) -> None:
        self._handing_over = False
        self.start()

    def hand_over(self, done: Callable[[], None]) -> None:
        """Let the worker finish what it does and end; everything stays stored."""
        self._handing_over, self._waiting = True, done
        if self.pid:
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        else:
            self._waiting = None
            done()

    def kill(self) -> None:
        """End a worker that does not end by itself."""
        if self.pid:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def remove(self) -> None:
        """End the machine's balloon: the worker, the connection and the sockets."""
        self._discarding = True
        self.watch_front_end()
        if self.pid:
            starting = self.state == "starting"  # it may not listen for signals yet
            number = signal.SIGKILL if starting else signal.SIGINT
            signal.pidfd_send_signal(self._pidfd, number)
        else:
            self.discard()

    def discard(self) -> None:
        """Close everything that is stored."""
        self._discarding = True
        self.watch_front_end()
        if self._retry is not None:
            self._retry.cancel()
        for name in set(self._names()):
            self._services.upstream.remove(self.key, name)
        self._services.store.discard(self.key)
        if self._notify is not None:
            self._notify.close()
            self._notify = None
        self._services.ended(self)

    def _set_state(self, state: str) -> None:
        self.state = state
        self._services.changed(self)

    # -- what the worker says -------------------------------------------------------------------

    def _drain(self) -> None:
        """Read everything that a dead worker has sent, then close its socket."""
        notify, self._notify = self._notify, None
        if notify is None:
            return
        asyncio.get_running_loop().remove_reader(notify)
        while self._read_one(notify):
            pass
        notify.close()

    def _read(self) -> None:
        for _ in range(DATAGRAMS_PER_WAKEUP):
            if self._notify is None or not self._read_one(self._notify):
                return

    def _read_one(self, notify: socket.socket) -> bool:
        """Handle one datagram; return False when there is none."""
        try:
            data, fds = fdsocket.receive_some(notify, DATAGRAM_MAX + 1)
        except BlockingIOError:
            return False
        except fdsocket.TruncatedError as error:
            log.error("%s: %s", self.name, error)
            return True
        except OSError:
            return False
        if not data:
            return False
        try:
            said = parse(data, len(fds))
        except NotifyError as error:
            close_fds(fds)
            log.error("%s: notification refused: %s", self.name, error)
            return True
        self._handle(said, fds)
        return True

    def _handle(self, said: Notification, fds: list[int]) -> None:
        if said.barrier:
            self._services.upstream.barrier(lambda: close_fds(fds))
            return
        if said.store:
            self._store(said.name, fds)
        if said.remove and said.name not in (LISTEN, CONTROL):
            self._remove(said.name)
            if _is_connection(said.name):
                self._front_end_gone()
        if said.status is not None:
            self.status = said.status
        if said.ready:
            self._ready()
        if said.stopping:
            self._stopping = True
        if said.watchdog:
            self._feed_watchdog()

    def _store(self, name: str, fds: list[int]) -> None:
        if name in (LISTEN, CONTROL) or _is_connection(name):
            close_fds(fds)  # these are the keeper's own
            log.error("%s: notification refused: the name %s", self.name, name)
            return
        try:
            new = self._services.store.add(self.key, name, fds)
        except NotifyError as error:
            log.error("%s: notification refused: %s", self.name, error)
            return
        self._services.upstream.store(self.key, name, new)

    def _ready(self) -> None:
        self._set_state("quiet" if self._quiet else "running")
        for name in self._names():
            if _is_connection(name):
                self._hand_over_connection(name)  # refused if the worker has it

    def _front_end_gone(self) -> None:
        if self.options.get("fd") is not None and not self.has_listener:
            self._stopping = True  # an inherited connection is served once
            self.remove()
            return
        self.watch_front_end()

    @property
    def has_listener(self) -> bool:
        """Whether further front-ends can connect."""
        return self._services.store.get(self.key, LISTEN) is not None

    def _feed_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        loop = asyncio.get_running_loop()
        self._watchdog = loop.call_later(WATCHDOG_SECONDS, self._starved)
        self._look_for_waiting()

    def _look_for_waiting(self) -> None:
        """Warn if a further front-end waits; if it still waits, let the worker decide."""
        waiting = False
        listener = self._services.store.get(self.key, LISTEN)
        held = [fd for name, fd in self._services.store.of(self.key) if _is_connection(name)]
        if listener is not None and held and not self._accepts_itself:
            waiting = holder.waits(listener)
        if waiting and not self._contended:
            log.warning(
                "%s: another front-end waits; the device serves one at a time, and %s holds it",
                self.name, holder.name_of(held[0]),
            )  # fmt: skip
        elif waiting and self._notify is not None:
            try:
                fdsocket.send_some(self._notify, holder.WAITING, [])
            except OSError as error:
                log.debug("%s: %s", self.name, error.strerror)
        self._contended = waiting

    def _starved(self) -> None:
        log.error("%s: the worker has not reported for %d s", self.name, WATCHDOG_SECONDS)
        self.kill()


def _is_connection(name: str) -> bool:
    return name[:1] == CONNECTION and name[1:].isdigit()
