# SPDX-License-Identifier: Apache-2.0
"""A QEMU monitor for tests: one command, one answer, events kept. Synchronous, on the ``qemu.qmp``
package.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, EventListener, ExecuteError, Message, QMPClient

__all__ = ["ExecuteError", "Qmp"]

CONNECT_SECONDS = 10.0


class Qmp:
    """A connection to a monitor, with an event loop of its own that runs only inside calls."""

    def __init__(self, path: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("lab")
        self._listener = EventListener()
        self._client.register_listener(self._listener)
        self._seen: list[Message] = []
        self._loop.run_until_complete(self._connect(str(path)))

    async def _connect(self, path: str) -> None:
        """Connect, and retry: a socket has its name a moment before it listens."""
        deadline = time.monotonic() + CONNECT_SECONDS
        while True:
            try:
                return await self._client.connect(path)
            except ConnectError as error:
                refused = isinstance(error.exc, ConnectionRefusedError)
                if not refused or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.02)

    def command(self, name: str, **arguments: Any) -> Any:
        """Run a command; its return value. :class:`ExecuteError` is QEMU's refusal.

        Underscores in the arguments' names become dashes.
        """
        return self.execute(name, {k.replace("_", "-"): v for k, v in arguments.items()})

    def execute(self, name: str, arguments: dict[str, Any]) -> Any:
        """As :meth:`command`, with the arguments' names as they are (device properties)."""
        return self._loop.run_until_complete(self._client.execute(name, arguments or None))

    def events(self) -> list[Message]:
        """All events so far, oldest first."""
        self._loop.run_until_complete(asyncio.sleep(0))
        while not self._listener.empty():
            self._seen.append(self._loop.run_until_complete(self._listener.get()))
        return self._seen

    def wait_event(self, name: str, timeout: float = 30, **data: Any) -> dict[str, Any]:
        """Return the first event ``name`` with these data since the start; wait for it.

        Raise :class:`TimeoutError` after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            for event in self.events():
                if event["event"] == name and _matches(event, data):
                    self._seen.remove(event)
                    return dict(event)
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(
                    f"no event {name} in {timeout} s; seen: {[e['event'] for e in self._seen]}"
                )
            self._loop.run_until_complete(self._wait(left))

    async def _wait(self, seconds: float) -> None:
        try:
            self._seen.append(await asyncio.wait_for(self._listener.get(), seconds))
        except TimeoutError:
            pass

    def close(self) -> None:
        """Disconnect; may be called twice."""
        if self._loop.is_closed():
            return
        try:
            self._loop.run_until_complete(self._client.disconnect())
        except Exception:  # the peer may have died in any way; nothing is left to do about it
            pass
        self._loop.close()


def _matches(event: Message, wanted: dict[str, Any]) -> bool:
    data = event.get("data")
    return not wanted or (isinstance(data, dict) and wanted.items() <= data.items())
