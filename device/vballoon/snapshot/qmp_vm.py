# SPDX-License-Identifier: Apache-2.0
"""Blocking QMP client with the few commands that a snapshot needs."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any, Self

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from vballoon.errors import UsageError

__all__ = ("Memdev", "QemuClosed", "QemuGone", "QemuRefused", "QemuVm", "RamBlock")

ANSWER_SECONDS = 60.0
"""How long QEMU may take to answer: its monitor waits while the main loop is busy."""
POLL_SECONDS = 0.01
_BLOCK = re.compile(
    r"^\s*(\S.*?)\s+\d+ \w+\s+0x[0-9a-f]+\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\s+0x([0-9a-f]+)\s+(r[ow])$"
)


class QemuRefused(UsageError):
    """QEMU answered a command with an error."""


class QemuGone(UsageError):
    """QEMU has closed the connection, or does not answer."""


class QemuClosed(QemuGone):
    """Nobody listens on the monitor's socket."""


@dataclass(frozen=True, slots=True)
class Memdev:
    """A memory backend object; ``path``: of its file, if it has a name."""

    id: str
    size: int
    share: bool
    path: str | None


@dataclass(frozen=True, slots=True)
class RamBlock:
    """A block of QEMU's RAM at *host*, its address in QEMU's own memory.

    ``read_only`` blocks are firmware, which every QEMU loads itself.
    """

    name: str
    size: int
    host: int
    read_only: bool


class QemuVm:
    """A monitor connection; a context manager. Methods raise QemuRefused and QemuGone."""

    def __init__(self, path: str | os.PathLike[str], timeout: float = 10.0) -> None:
        self.path = os.fspath(path)
        self.pid = 0
        """The process listening on the monitor: QEMU, unless a manager opened the socket for it."""
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("vballoon")
        self._events = EventListener()
        self._client.register_listener(self._events)
        self._seen: list[Any] = []
        try:
            self._run(
                self._client.connect(self._connected_socket()),
                timeout,
                late="another client, such as libvirt, uses this monitor; give QEMU one more with "
                "-qmp unix:PATH,server=on,wait=off",
            )
        except BaseException:
            self._loop.close()
            raise

    def _connected_socket(self) -> socket.socket:
        """Return a connected socket. We make it ourselves to read the peer's credentials."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(self.path)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        except OSError as error:
            connection.close()
            raise QemuClosed(f"{self.path}: {error.strerror}") from None
        self.pid = struct.unpack("iII", credentials)[0]
        return connection

    def _run(self, work: Any, timeout: float, late: str = "") -> Any:
        try:
            return self._loop.run_until_complete(asyncio.wait_for(work, timeout))
        except ExecuteError as error:
            raise QemuRefused(f"QEMU: {error.error.error.desc}") from None
        except TimeoutError:
            why = f"no answer within {timeout:g} s" + (f": {late}" if late else "")
            raise QemuGone(f"{self.path}: {why}") from None
        except (QMPError, OSError, EOFError) as error:
            raise QemuGone(f"{self.path}: {error}") from None

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run *command* and return its result. For names with dashes use ``**{"a-b": 1}``."""
        return self._run(self._client.execute(command, arguments or None), ANSWER_SECONDS)

    def send_fd(self, fd: int) -> int:
        """Send *fd* to QEMU. Return the number of its descriptor set (``/dev/fdset/<number>``)."""
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as error:  # it is not a coroutine, so _run does not see it
            raise QemuGone(f"{self.path}: {error}") from None
        return int(self.execute("add-fd")["fdset-id"])

    def wait_event(self, name: str, timeout: float, **data: Any) -> dict[str, Any] | None:
        """Return and consume the first event *name* with *data* since the connection began.

        Return None if there is none within *timeout* seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            for event in self._seen:
                if event["event"] == name and data.items() <= dict(event["data"]).items():
                    self._seen.remove(event)
                    return dict(event)
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            try:
                self._seen.append(
                    self._loop.run_until_complete(asyncio.wait_for(self._events.get(), left))
                )
            except TimeoutError:
                return None

    def count_events(self, name: str) -> int:
        """Return how many events *name* have come between connecting and the latest answer."""
        while not self._events.empty():
            self._seen.append(self._loop.run_until_complete(self._events.get()))
        return sum(event["event"] == name for event in self._seen)

    def wait_gone(self, timeout: float) -> bool:
        """Return whether QEMU closes its monitor within *timeout* seconds, after ``quit``."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                self.execute("query-status")
            except QemuGone:
                return True
            time.sleep(POLL_SECONDS)
        return False

    def status(self) -> str:
        """Return QEMU's run state: ``running``, ``paused`` and so on."""
        return str(self.execute("query-status")["status"])

    def memdevs(self) -> list[Memdev]:
        """Return all memory backends."""
        found = []
        for entry in self.execute("query-memdev"):
            name = entry.get("id")
            if name is None:
                raise UsageError("a memory backend has no id; give it one with id=NAME")
            kind = self.execute("qom-get", path=f"/objects/{name}", property="type")
            path = None
            if kind == "memory-backend-file":
                path = self.execute("qom-get", path=f"/objects/{name}", property="mem-path")
            found.append(Memdev(name, entry["size"], bool(entry.get("share")), path))
        return found

    def ram_blocks(self) -> list[RamBlock]:
        """Return all blocks of RAM, those of the memory backends among them."""
        text = self.execute("x-query-ramblock")["human-readable-text"]
        lines = [line for line in text.splitlines() if "0x" in line]
        found = [_BLOCK.match(line) for line in lines]
        if not lines or not all(found):
            raise UsageError("the output of x-query-ramblock is in an unknown format")
        return [
            RamBlock(m[1].removeprefix("/objects/"), int(m[2], 16), int(m[3], 16), m[4] == "ro")
            for m in found
            if m is not None
        ]

    def close(self) -> None:
        """Disconnect; safe to call twice."""
        if self._loop.is_closed():
            return
        try:
            self._loop.run_until_complete(asyncio.wait_for(self._client.disconnect(), 5))
        except Exception:  # the peer may have died in any way, and we are done with it
            pass
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
