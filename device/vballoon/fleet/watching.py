# SPDX-License-Identifier: Apache-2.0
"""Ask many control sockets at once, and wait for none of them longer than a time limit."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from qemu.qmp import QMPClient, QMPError

from vballoon.errors import UsageError
from vballoon.fleet.sample import AnswerError, Sample, parse, unreachable

__all__ = ("Machine", "Watcher", "machines")

TIME_LIMIT = 5.0
"""Seconds within which a server must have answered everything."""
ANSWER_MAX = 4 << 20
"""Bytes of one answer."""

_quiet = logging.getLogger("vballoon.fleet.qmp")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False


class Machine:
    """A control socket that is asked again and again over one connection."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path
        self._client: QMPClient | None = None

    async def ask(self, limit: float = TIME_LIMIT) -> Sample:
        """Return what the server says now; a sample with an error if it does not in *limit* s."""
        try:
            return await asyncio.wait_for(self._ask(), limit)
        except TimeoutError:
            reason = f"no answer within {limit:g} s"
        except AnswerError as error:
            reason = f"not the answer of a vballoon server: {error}"
        except (QMPError, OSError) as error:
            reason = _why(error)
        await self.close()
        return unreachable(self.name, reason)

    async def _ask(self) -> Sample:
        client = self._client
        if client is None:
            client = self._client = QMPClient(readbuflen=ANSWER_MAX)
            client.logger = _quiet  # what went wrong is in the sample
            await client.connect(self.path)
        status = await client.execute("query-status")
        if not isinstance(status, dict) or not status.get("guest-size"):
            return parse(self.name, status)
        stats = await client.execute("query-guest-stats")
        return parse(self.name, status, stats, await client.execute("query-skip-bitmap"))

    async def close(self) -> None:
        """End the connection."""
        client, self._client = self._client, None
        if client is not None:
            try:
                await asyncio.wait_for(client.disconnect(), TIME_LIMIT)
            except (QMPError, OSError, EOFError, TimeoutError):
                pass  # it had failed before


def _why(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text or type(error).__name__


class Watcher:
    """Several machines; a context manager for ``async with``."""

    def __init__(self, watched: Sequence[Machine]) -> None:
        self.machines = tuple(watched)

    async def ask(self, limit: float = TIME_LIMIT) -> list[Sample]:
        """Return a sample of each machine, in order, after at most *limit* seconds."""
        return list(await asyncio.gather(*(machine.ask(limit) for machine in self.machines)))

    async def __aenter__(self) -> Watcher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End every connection."""
        await asyncio.gather(*(machine.close() for machine in self.machines))


def machines(words: Sequence[str]) -> list[Machine]:
    """Return the machines that *words* name: ``SOCKET`` or ``NAME=SOCKET``.

    Without a name, a machine is called after its socket's file, or by the whole path where two
    files have the same name.  Raise :class:`~vballoon.errors.UsageError` for a name used twice.
    """
    given = [
        word.partition("=") if "=" in word and not os.path.exists(word) else ("", "", word)
        for word in words
    ]
    stems = [Path(path).stem for _, _, path in given]
    found: dict[str, Machine] = {}
    for (name, _, path), stem in zip(given, stems, strict=True):
        chosen = name or (stem if stems.count(stem) == 1 else path)
        if chosen in found:
            raise UsageError(f"two machines are named {chosen}: use NAME=SOCKET")
        found[chosen] = Machine(chosen, path)
    return list(found.values())
