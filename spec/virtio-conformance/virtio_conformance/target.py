# SPDX-License-Identifier: Apache-2.0
"""The back-end under test: a socket of a running program, or a command to start."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from virtio_conformance.findings import Crash, Finding, Hang, NotStarted
from virtio_conformance.observe import Process
from virtio_conformance.wiretap import Tap, connect, peer_pid

__all__ = ("Options", "Target", "fill", "serves_once")

_DEATH_CRIES = re.compile(
    r"Traceback \(most recent call last\)|panicked at|AddressSanitizer|Assertion .* failed"
    r"|Segmentation fault|Exception ignored in|Task exception was never retrieved"
)
_SERVES_ONCE: dict[str, bool] = {}
"""Command → whether the program serves one connection and ends, once that has been tried."""
_PLACE = re.compile(r"\{(socket|dir|n)\}")


def fill(text: str, **places: object) -> str:
    """Return *text* with ``{socket}``, ``{dir}`` and ``{n}`` replaced; other braces stay."""
    return _PLACE.sub(lambda found: str(places.get(found[1], found[0])), text)


@dataclass(frozen=True)
class Options:
    """The options of the command line that describe the back-end."""

    protocol: str = "vhost-user"
    socket: str = ""
    command: str = ""
    before: str = ""
    """A shell command that prepares ``{dir}`` before each start."""
    config_change: str = ""
    """A shell command that makes the device change its configuration; ``{n}`` differs each time."""
    hint_start: str = ""
    """A shell command that starts a round of free page hinting."""
    hint_done: str = ""
    """A shell command that ends the round of free page hinting."""
    device: str = "none"
    time_limit: float = 10.0
    answer_limit: float = 2.0
    start_limit: float = 10.0
    polls: bool = False
    """The back-end polls its rings: it uses processor time by design."""
    keep: bool = False
    """A spawned back-end serves the following tests too, as long as they pass."""
    discards: bool = True
    """The balloon frees memory (false for one started with discards switched off)."""
    robustness: bool = True
    """Send malformed messages and rings, and check that they do no harm."""
    spec: str = "1.4"
    """Version of the virtio standard whose statements are checked."""


class Target:
    """Starts the back-end if there is a command, connects to it, and watches it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.popen: subprocess.Popen[bytes] | None = None
        self.process: Process | None = None
        self.folder: Path | None = None
        self.socket = options.socket
        self.connections = self._changes = 0
        self.taps: list[Tap] = []
        """Every connection so far, for the report."""
        if options.command:
            self._start()

    @property
    def spawned(self) -> bool:
        """Whether the suite started this back-end."""
        return self.popen is not None

    def _start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="conf-"))
        self.socket = str(self.folder / "s")
        places = {"socket": self.socket, "dir": str(self.folder)}
        self._prepare(fill(self.options.before, **places))
        words = [fill(word, **places) for word in shlex.split(self.options.command)]
        with (self.folder / "output").open("wb") as output:
            try:
                self.popen = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                self.stop()
                raise NotStarted(f"{words[0]} cannot be started: {error.strerror}") from None

    def _prepare(self, command: str) -> None:
        """Run the ``--before`` command; raise :class:`NotStarted` when it fails."""
        if command and (status := subprocess.run(command, shell=True).returncode):
            self.stop()
            raise NotStarted(f"--before ends with status {status}: {command}")

    def change_configuration(self, meanwhile: Callable[[float], None]) -> None:
        """Run the operator's command that makes the device change its configuration.

        *meanwhile* is called repeatedly until it ends, to serve messages of the server.
        """
        self.operate(self.options.config_change, meanwhile)

    def operate(self, command: str, meanwhile: Callable[[float], None]) -> None:
        """Run a command of the operator, and call *meanwhile* repeatedly until it ends."""
        self._changes += 1
        places = {"socket": self.socket, "dir": str(self.folder or "."), "n": self._changes % 7 + 1}
        command = fill(command, **places)
        running = subprocess.Popen(command, shell=True, stdout=subprocess.DEVNULL)
        while running.poll() is None:
            meanwhile(0.02)
        if running.returncode:
            raise Finding(f"{command} ends with status {running.returncode}")

    def connect(self, limit: float | None = None) -> socket.socket:
        """Return a new connection.  Raise :class:`Finding` if connecting fails.

        The first one waits for the program to start, any other one for an answer.
        """
        if limit is None:
            first = not self.connections
            limit = self.options.start_limit if first else self.options.answer_limit
        deadline = time.monotonic() + limit
        while True:
            try:
                sock = connect(self.socket, 0.1)
                break
            except Hang:
                if self.popen is not None and self.popen.poll() is not None:
                    raise Finding(f"the back-end ended: {self.how_it_ended()}") from None
                if time.monotonic() > deadline:
                    raise
        self.connections += 1
        self.process = Process(peer_pid(sock))
        return sock

    @property
    def first_limit(self) -> float:
        """Seconds for the first answer on the newest connection: a program may still start."""
        options = self.options
        return options.start_limit if self.connections <= 1 else options.answer_limit

    def output(self) -> str:
        """Return the output of the back-end, at most the last 20 kB."""
        if self.folder is None:
            return ""
        try:
            return (self.folder / "output").read_bytes()[-20000:].decode(errors="replace")
        except OSError:
            return ""

    def plain(self, text: str) -> str:
        """Return *text* with the folder of this back-end replaced by the names in its command."""
        if self.folder is None:
            return text
        return text.replace(self.socket, "{socket}").replace(str(self.folder), "{dir}")

    def how_it_ended(self) -> str:
        """Return the exit status and the last lines of output, for people."""
        if self.popen is None or self.popen.poll() is None:
            return "it runs"
        code = self.popen.returncode
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return name + "".join(f"\n  | {line}" for line in self.output().splitlines()[-8:])

    @property
    def gone(self) -> bool:
        """Whether the process has ended."""
        if self.popen is not None:
            return self.popen.poll() is not None
        return self.process is not None and not self.process.alive

    @property
    def left_in_peace(self) -> bool:
        """Whether the process ended by itself without an error, after serving one connection."""
        return self.popen is not None and self.popen.poll() == 0

    def ends_within(self, limit: float) -> bool:
        """Return whether the program ends within *limit* seconds."""
        deadline = time.monotonic() + limit
        while not self.gone and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.gone

    def ends_after_a_connection(self, limit: float = 3.0) -> bool:
        """Return whether no other connection is possible, because the program serves one and ends.

        A program that a signal ended returns False; the next connection reports it.
        """
        if self.popen is None or not serves_once(self.options):
            return False
        return self.ends_within(limit) and self.popen.returncode >= 0

    def expect_healthy(self) -> None:
        """Raise :class:`Crash` for an end by a signal, or for a traceback in the output."""
        if self.gone and not self.left_in_peace:
            code = self.popen.poll() if self.popen else 0
            killed = code is not None and code < 0 and code != -signal.SIGTERM
            if self.popen is None or killed or self._cry():
                raise Crash(f"the back-end crashed: {self.how_it_ended()}")
        cry = self._cry()
        if cry:
            raise Crash(f"the back-end's output has {cry!r}:\n{self.output()[-1500:]}")

    def _cry(self) -> str:
        found = _DEATH_CRIES.search(self.output())
        return found[0] if found else ""

    def stop(self) -> None:
        """Stop the back-end if the suite started it, and remove its folder."""
        if self.popen is not None and self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(2)
            except subprocess.TimeoutExpired:
                os.killpg(self.popen.pid, signal.SIGKILL)
                self.popen.wait(5)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def serves_once(options: Options, limit: float = 1.0) -> bool:
    """Return whether a spawned program ends by itself after its first front-end has left.

    A separate instance of the program is tried once, and the result is kept.
    """
    command = options.command
    if command and command not in _SERVES_ONCE:
        fresh = Target(options)
        try:
            fresh.connect().close()
            _SERVES_ONCE[command] = fresh.ends_within(limit)
        except Finding:
            _SERVES_ONCE[command] = False
        finally:
            fresh.stop()
    return _SERVES_ONCE.get(command, False)
