# SPDX-License-Identifier: Apache-2.0
"""A worker: one machine's balloon, its connection and its control socket, in a sandbox.

It continues what the journal describes.  It ends when it is asked to (``quit``; then it says
STOPPING), when the keeper plans a hand-over (SIGTERM; then everything stays in the store), or when
its journal cannot be used.
"""

from __future__ import annotations

import asyncio
import grp
import json
import logging
import os
import pwd
import signal
import socket
from typing import TYPE_CHECKING, Any

import fdsocket
from fdsocket import close_fds
from vballoon.balloon import Balloon, persist
from vballoon.control.operator import Operator
from vballoon.control.server import ControlServer
from vballoon.errors import PeerError, VballoonError
from vballoon.keeper import fault, sandbox
from vballoon.keeper.answers import AnswerFile
from vballoon.keeper.features import device_names, parse_features
from vballoon.keeper.frontends import Continued, Frontends
from vballoon.keeper.holder import WAITING
from vballoon.keeper.journal import Journal, JournalError
from vballoon.keeper.keeping import Keeping
from vballoon.keeper.notifier import Notifier
from vballoon.keeper.notify import DATAGRAM_MAX
from vballoon.keeper.stream import Progress
from vballoon.keeper.transports import Events, VfioUser
from vballoon.native import guard
from vballoon.sizes import parse_limits

if TYPE_CHECKING:
    from vballoon.keeper.features import Offered
    from vballoon.keeper.spawn import Start

__all__ = ("EXIT_REFUSED_JOURNAL", "JOURNAL_VERSION", "WATCHDOG_SECONDS", "run")

log = logging.getLogger("vballoon.worker")

JOURNAL_VERSION = 1
"""Version of the state in the journal."""
EXIT_REFUSED_JOURNAL = 4
"""Exit status of a worker that cannot continue from its journal."""
WATCHDOG_SECONDS = 10.0
"""The keeper replaces a worker that has not reported for so long."""
CONTROL, JOURNAL, ANSWERS = "control", "journal", "answers"
"""Names in the store that are not those of a role."""


def run(start: Start, notify: int, fds: list[int]) -> int:
    """Serve the machine of *start* until the end; return the exit status."""
    notifier = Notifier(socket.socket(fileno=notify))
    given: dict[str, int] = {}
    for name, fd in zip(start.names, fds, strict=True):
        os.set_inheritable(fd, False)
        given[name] = fd
    try:
        return asyncio.run(_Worker(start, notifier, given).main())
    except JournalError as error:
        log.error("%s", error)
        return EXIT_REFUSED_JOURNAL


class _Worker:
    def __init__(self, start: Start, notifier: Notifier, given: dict[str, int]) -> None:
        self._start, self._notifier, self._given = start, notifier, given
        self._leaving: list[str] = []  # connections that have ended
        self._transport: Frontends | VfioUser
        self._done: asyncio.Future[int] = None  # type: ignore[assignment]
        self._connected: str | None = None  # the connection's name

    async def main(self) -> int:
        """Continue or begin, then serve."""
        loop = asyncio.get_running_loop()
        self._done = loop.create_future()
        loop.add_signal_handler(signal.SIGTERM, self._hand_over)
        loop.add_signal_handler(signal.SIGINT, self._end)
        guard.install()
        self._open_files()
        self._make_machine()
        sandbox.enter(_policy(self._start))
        loop.add_reader(self._notifier.fileno(), self._from_keeper)
        self._continue()
        if CONTROL in self._given:
            self._control.start(fdsocket.adopt(self._given[CONTROL]))
            self._poll_stats = self._operator.interval_changed
            self._operator.interval_changed = self._interval_changed
            self._poll_stats()
        if isinstance(self._transport, VfioUser):
            self._serving = loop.create_task(self._transport.run())
        self._notifier.ready()
        self._alive()
        return await self._done

    def _finish(self, code: int) -> None:
        if not self._done.done():
            self._done.set_result(code)

    def _hand_over(self) -> None:
        """End between two messages, for a worker that continues with the skip map's bits."""
        if isinstance(self._transport, Frontends):
            try:
                self.record(self._frontends.progress, pages=True)
            except JournalError:  # more ranges than the journal holds: they are void then
                self.record(self._frontends.progress)
        self._finish(0)

    def _end(self) -> None:
        """End the connection in good order: the driver gets its buffers back."""
        self._transport.close()
        asyncio.get_running_loop().call_later(0, self._finish, 0)

    def _alive(self) -> None:
        self._notifier.watchdog()
        self._control.report_problems()
        if not self._notifier.alive and not self._transport.status().connected:
            log.warning("the keeper has gone, and no front-end is connected")
            self._finish(0)
        asyncio.get_running_loop().call_later(WATCHDOG_SECONDS / 3, self._alive)

    # -- what is kept ---------------------------------------------------------------------------

    def _open_files(self) -> None:
        """Open journal and answers; new ones go to the store before anything else happens."""
        if JOURNAL in self._given:
            self._journal = Journal(self._given[JOURNAL], JOURNAL_VERSION)
            self._answers = AnswerFile(self._given[ANSWERS])
            return
        self._journal, self._answers = Journal.create(JOURNAL_VERSION), AnswerFile.create()
        self._notifier.store(ANSWERS, self._answers.fd)
        self._notifier.store(JOURNAL, self._journal.fd)
        self._notifier.barrier()

    def record(self, progress: Progress, *, pages: bool = False) -> None:
        """See :class:`~vballoon.keeper.frontends.Recorder`; *pages*: with the skip map's bits."""
        transport, fds = self._frontends.state()
        self._keeping.update({str(slot): fd for slot, fd in fds.items()})
        fault.step("descriptors-stored")
        content = {
            "progress": [progress.number, progress.size, progress.answer],
            "connection": self._connected,
            "names": self._keeping.names,
            "transport": transport.hex(),
            "device": persist.pack(self._balloon.state(pages=pages)).hex(),
            "config": self._balloon.read_config().hex(),
        }
        self._journal.write(json.dumps(content, separators=(",", ":")).encode())

    def settle(self) -> None:
        """See :class:`~vballoon.keeper.frontends.Recorder`."""
        self._keeping.settle()
        for name in self._leaving:
            self._notifier.remove(name)
        self._leaving.clear()

    def _interval_changed(self) -> None:
        self._poll_stats()
        self.record(self._frontends.progress)

    # -- the machine ------------------------------------------------------------------------------

    def _make_machine(self) -> None:
        options = self._start.options
        features = parse_features(options.get("features", ""))
        self._balloon = Balloon(
            features.device,
            discard=not options.get("no-discard", False),
            limits=parse_limits(options),
        )
        self._operator = Operator(self._balloon, self, stop=self._quit)
        self._control = ControlServer(self._operator)
        kept = {name: fd for name, fd in self._given.items() if _is_kept(name)}
        self._keeping = Keeping(self._notifier, {}, kept)
        self._transport = self._frontends = Frontends(
            self._balloon,
            features,
            Events(self._control.event),
            device_names(),
            self._answers,
            self,
            self._gone,
            engine=options.get("engine", "batch"),
            quiet=self._start.quiet,
        )
        if "vfio-user" in options:
            self._transport = self._make_vfio_user(features)

    def _make_vfio_user(self, features: Offered) -> VfioUser:
        """Return the transport whose connections end with this process."""
        return VfioUser(
            self._balloon,
            features,
            self._control.event,
            device_names(),
            sock=fdsocket.adopt(self._given["listen"]),
            engine=self._start.options.get("engine", "batch"),
            msix=not self._start.options.get("no-msix", False),
        )

    def status(self) -> Any:
        """See :class:`~vballoon.control.operator.ControlledTransport`."""
        return self._transport.status()

    def _quit(self) -> None:
        self._notifier.stopping()
        self._finish(0)

    def _gone(self, reason: str) -> None:
        """Handle the end of the front-end's connection: nothing of it is needed any more."""
        connection, self._connected = self._connected, None
        if connection is not None:
            self._leaving.append(connection)
        self.record(Progress())
        self.settle()
        log.debug("connection %s ended", connection)

    def _from_keeper(self) -> None:
        """Take a connection that the keeper has accepted and stored."""
        try:
            data, fds = fdsocket.receive_some(self._notifier.sock, DATAGRAM_MAX)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:  # the keeper is gone; the machine is served without it
            asyncio.get_running_loop().remove_reader(self._notifier.fileno())
            return
        if data == WAITING:
            self._frontends.drop_silent()
            return
        name = data.decode(errors="replace").removeprefix("FDNAME=")
        if len(fds) != 1 or self._connected is not None:
            close_fds(fds)
            return
        self._begin(name, fdsocket.adopt(fds[0]))

    def _begin(self, name: str, sock: socket.socket) -> None:
        self._connected = name
        self._frontends.serve(sock)
        self.record(Progress())

    # -- after a death ----------------------------------------------------------------------------

    def _continue(self) -> None:
        """Continue the connection that the journal describes, or begin one that it does not."""
        connections = [name for name in self._given if name.startswith("c") and name != CONTROL]
        content = self._journal.content
        saved = _parse(content) if content is not None else None
        if saved is not None:
            self._load(saved)
        if saved is not None and saved["connection"] in connections:
            self._resume(saved)
        elif connections:  # accepted, and the worker died before it wrote a line about it
            name = connections[-1]
            self._leaving += connections[:-1]
            self._begin(name, fdsocket.adopt(self._given[name]))
        self.settle()

    def _load(self, saved: dict[str, Any]) -> None:
        try:
            self._balloon.load(bytes.fromhex(saved["device"]))
        except (PeerError, ValueError) as error:
            raise JournalError(f"the journal's device: {error}") from None

    def _resume(self, saved: dict[str, Any]) -> None:
        self._connected = saved["connection"]
        names = saved["names"]
        try:
            fds = {int(slot): os.dup(self._given[name]) for slot, name in names.items()}
            state = bytes.fromhex(saved["transport"])
            before = Continued(state, fds, Progress(*saved["progress"]))
            sock = fdsocket.adopt(self._given[saved["connection"]])
            self._keeping.names = dict(names)
            self._frontends.serve(sock, before)
        except (VballoonError, KeyError, TypeError, ValueError, OSError) as error:
            raise JournalError(f"cannot continue from the journal: {error!r}") from None
        if self._balloon.read_config() != bytes.fromhex(saved["config"]):
            self._frontends.config_changed()  # a round ended with the worker


def _is_kept(name: str) -> bool:
    """Return whether *name* in the store is that of a descriptor of the state."""
    return name[:1] == "n" and name[1:].isdigit()


def _parse(content: bytes) -> dict[str, Any]:
    """Return what is in the journal.  Raise JournalError for anything but an object."""
    try:
        saved = json.loads(content)
        progress = saved["progress"]
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in progress):
            raise ValueError("progress")
        names = saved["names"]
        if not all(isinstance(part, str) for pair in names.items() for part in pair):
            raise ValueError("names")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise JournalError(f"the journal is malformed: {error!r}") from None
    return dict(saved)


def _policy(start: Start) -> sandbox.Policy:
    """Return the sandbox of this worker."""
    options = start.options
    user = pwd.getpwnam(options["user"]) if "user" in options else None
    group = user.pw_gid if user is not None else None
    if "group" in options:
        group = grp.getgrnam(options["group"]).gr_gid
    folders = tuple(
        os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for path in options.get("folders", ())
    )
    mode = sandbox.SandboxMode(start.sandbox)
    uid = user.pw_uid if user is not None else None
    return sandbox.Policy(start.name, mode, user=uid, group=group, folders=folders)
