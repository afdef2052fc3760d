# SPDX-License-Identifier: Apache-2.0
"""Rate limits for events, so that a guest cannot flood the clients.

As in QEMU, an event that a guest can cause at will is sent at most once a second.  Of the events
held back, the last one is sent when the second has passed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

__all__ = ("EventThrottle",)

INTERVAL = 1.0
"""Seconds between two events of the same kind (QEMU's for BALLOON_CHANGE)."""
THROTTLED = {"BALLOON_CHANGE": None, "QUEUE_BROKEN": "queue"}
"""Event to the member that distinguishes its kinds."""
KINDS_MAX = 1024
"""Maximum number of kinds that are limited separately; a device has far fewer queues."""


class EventThrottle:
    """Pass ``(name, data, UNIX time)`` to *emit*, delaying or dropping events above the limit."""

    def __init__(
        self, emit: Callable[[str, dict[str, Any], float], None], interval: float = INTERVAL
    ) -> None:
        self._emit = emit
        self._interval = interval
        self._held: dict[tuple[str, Any], tuple[dict[str, Any], float] | None] = {}

    def __call__(self, loop: asyncio.AbstractEventLoop, name: str, data: dict[str, Any]) -> None:
        """Emit the event *name* now, or hold it back."""
        now = time.time()
        if name not in THROTTLED:
            self._emit(name, data, now)
            return
        member = THROTTLED[name]
        key = (name, str(data.get(member)) if member else None)
        if key in self._held:
            self._held[key] = (data, now)
        elif len(self._held) < KINDS_MAX:
            self._held[key] = None
            self._emit(name, data, now)
            loop.call_later(self._interval, self._release, loop, key)

    def _release(self, loop: asyncio.AbstractEventLoop, key: tuple[str, Any]) -> None:
        held = self._held[key]
        if held is None:
            del self._held[key]
            return
        self._held[key] = None
        self._emit(key[0], *held)
        loop.call_later(self._interval, self._release, loop, key)
