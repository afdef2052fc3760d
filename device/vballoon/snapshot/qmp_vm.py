# SPDX-License-Identifier: Apache-2.0
"""QEMU over QMP, for whoever waits: the few things that a snapshot asks of it."""

from __future__ import annotations

import asyncio
import os
import re
import time
from dataclasses import dataclass
from typing import Any, Self

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from vballoon.errors import UsageError

__all__ = ("Memdev", "QemuGone", "QemuRefused", "QemuVm", "RamBlock", "Section")

ANSWER_SECONDS = 60.0
"""How long QEMU may take for an answer: its monitor waits while the main loop is busy."""
_SECTION = re.compile(
    r"^  ([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (\w+)\): (\S+)(?: @([0-9a-f]{16}))?"
)
_BLOCK = re.compile(
    r"^\s*(\S.*?)\s+\d+ \w+\s+0x[0-9a-f]+\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\s+0x[0-9a-f]+\s+(r[ow])$"
)


class QemuRefused(UsageError):
    """QEMU answered a command with an error."""


class QemuGone(UsageError):
    """There is no QEMU at the other end any more."""


@dataclass(frozen=True, slots=True)
class Memdev:
    """A memory backend object; ``named``: it is a file with a name."""

    id: str
    size: int
    share: bool
    named: bool


@dataclass(frozen=True, slots=True)
class RamBlock:
    """A block of QEMU's RAM; ``read_only`` ones are firmware, made anew by each QEMU."""

    name: str
    size: int
    read_only: bool


@dataclass(frozen=True, slots=True)
class Section:
    """A piece of the guest's physical address space that is RAM: block *name* from *offset* on."""

    start: int
    end: int
    name: str
    offset: int


class QemuVm:
    """A monitor connection; a context manager.  Raises QemuRefused and QemuGone."""

    def __init__(self, path: str | os.PathLike[str], timeout: float = 10.0) -> None:
        self.path = os.fspath(path)
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("vballoon")
        self._events = EventListener()
        self._client.register_listener(self._events)
        self._seen: list[Any] = []
        try:
            self._run(self._client.connect(self.path), timeout)
        except BaseException:
            self._loop.close()
            raise

    def _run(self, work: Any, timeout: float) -> Any:
        try:
            return self._loop.run_until_complete(asyncio.wait_for(work, timeout))
        except ExecuteError as error:
            raise QemuRefused(f"QEMU: {error.error.error.desc}") from None
        except TimeoutError:
            raise QemuGone(f"{self.path}: no answer within {timeout:g} s") from None
        except (QMPError, OSError, EOFError) as error:
            raise QemuGone(f"{self.path}: {error}") from None

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run *command*, argument names as QEMU writes them (use ``**{"a-b": 1}`` for dashes)."""
        return self._run(self._client.execute(command, arguments or None), ANSWER_SECONDS)

    def send_fd(self, fd: int) -> int:
        """Give QEMU *fd*; returns the number of its descriptor set (``/dev/fdset/<number>``)."""
        self._client.send_fd_scm(fd)
        return int(self.execute("add-fd")["fdset-id"])

    def wait_event(self, name: str, timeout: float, **data: Any) -> dict[str, Any] | None:
        """The first event *name* with *data* since the connection began; None: not in time."""
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

    def status(self) -> str:
        """QEMU's run state: ``running``, ``paused`` …"""
        return str(self.execute("query-status")["status"])

    def memdevs(self) -> list[Memdev]:
        """All memory backends."""
        found = []
        for entry in self.execute("query-memdev"):
            name = entry.get("id")
            if name is None:
                raise UsageError("a memory backend without an id cannot be named in a snapshot")
            kind = self.execute("qom-get", path=f"/objects/{name}", property="type")
            named = kind == "memory-backend-file"
            found.append(Memdev(name, entry["size"], bool(entry.get("share")), named))
        return found

    def ram_blocks(self) -> list[RamBlock]:
        """All blocks of RAM, the backends' among them."""
        text = self.execute("x-query-ramblock")["human-readable-text"]
        lines = [line for line in text.splitlines() if "0x" in line]
        found = [_BLOCK.match(line) for line in lines]
        if not lines or not all(found):
            raise UsageError("QEMU lists its RAM in a way that is not known here")
        return [
            RamBlock(m[1].removeprefix("/objects/"), int(m[2], 16), m[3] == "ro")
            for m in found
            if m is not None
        ]

    def sections(self) -> list[Section]:
        """Which block lies where in the guest's physical memory."""
        text = self.execute("human-monitor-command", **{"command-line": "info mtree -f"})
        for view in text.split("FlatView #"):
            if re.search(r'AS "memory"|AS "cpu-memory-0"', view):
                matches = [_SECTION.match(line) for line in view.splitlines()]
                return [
                    Section(
                        int(m[1], 16),
                        int(m[2], 16) + 1,
                        m[4].removeprefix("/objects/"),
                        int(m[5] or "0", 16),
                    )
                    for m in matches
                    if m is not None and m[3] in ("ram", "rom", "romd")
                ]
        raise UsageError("QEMU shows the guest's memory in a way that is not known here")

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
