# SPDX-License-Identifier: Apache-2.0
"""The keeper's side of the warm parent: it is started, asked for workers, and started again."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

from fdsocket import close_fds
from vballoon.keeper import spawn

__all__ = ("WarmParent",)

log = logging.getLogger("vballoon.keeper")


class WarmParent:
    """One warm parent.  *started* gets a worker's process id and pidfd (taken over), in the order
    of the requests; *exited* a process id and an exit code; *gone* is called when it has ended.
    """

    def __init__(
        self,
        started: Callable[[int, int], None],
        exited: Callable[[int, int], None],
        gone: Callable[[], None],
    ) -> None:
        self._started, self._exited, self._gone = started, exited, gone
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = dict(os.environ) | {"OPENBLAS_NUM_THREADS": "1"}
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
            environment.pop(name, None)  # the workers report to the keeper
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vballoon.keeper.warm", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=environment,
        )
        theirs.close()
        self._sock.setblocking(False)
        asyncio.get_running_loop().add_reader(self._sock, self._received)

    def start(self, start: spawn.Start, fds: Iterable[int]) -> None:
        """Ask for a worker; *fds* stay the caller's.  Raise OSError if the parent is gone."""
        self._sock.setblocking(True)
        try:
            spawn.send_start(self._sock, start, fds)
        finally:
            self._sock.setblocking(False)

    def _received(self) -> None:
        try:
            packet = spawn.receive(self._sock)
        except BlockingIOError:
            return
        except OSError:
            packet = None
        if packet is None:
            self.close()
            self._gone()
            return
        self._handle(*packet)

    def _handle(self, message: dict[str, Any], fds: list[int]) -> None:
        if "started" in message and len(fds) == 1:
            self._started(message["started"], fds[0])
            return
        close_fds(fds)
        if "exited" in message:
            self._exited(message["exited"], message["code"])

    def close(self) -> None:
        """Let the parent end; its workers run on."""
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            log.warning("the warm parent does not end")
