# SPDX-License-Identifier: Apache-2.0
"""What one server said about its machine, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ("AnswerError", "Sample", "parse", "unreachable")

COUNTERS_MAX = 64
"""Counters of a server that are kept; a server of this version has fewer than 20."""
QUEUES_MAX = 1024
COUNTER = re.compile(r"[a-z][a-z0-9-]{0,39}\Z")
RULE = re.compile(r"[a-z][a-z0-9.-]{0,59}\Z")


class AnswerError(ValueError):
    """An answer is not one of a vballoon server; the text says what is wrong."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A machine as its server described it; sizes are in bytes, None where nothing is known."""

    name: str
    error: str | None = None
    """Why the server could not be asked."""
    connected: bool = False
    """Whether a front-end is connected."""
    driver_running: bool | None = None
    guest_size: int | None = None
    actual: int | None = None
    """The guest's memory without the balloon."""
    target: int | None = None
    resident: int | None = None
    """Guest memory that the host holds."""
    available: int | None = None
    """What the guest can hand out without swapping, as its driver last said."""
    free: int | None = None
    ballooned: int | None = None
    reported: int | None = None
    restarts: int = 0
    broken: tuple[tuple[int, str], ...] = ()
    """Queue number and rule of each queue that was stopped for breaking a rule."""
    counters: Mapping[str, int] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """One word for a table: ``unreachable``, ``broken``, ``no driver``, ``waiting``, ``ok``."""
        if self.error is not None:
            return "unreachable"
        if not self.connected:
            return "waiting"
        if self.broken:
            return "broken"
        return "no driver" if self.driver_running is False else "ok"


def unreachable(name: str, error: str) -> Sample:
    """Return the sample of a server that could not be asked."""
    return Sample(name=name, error=error)


def parse(
    name: str, status: object, stats: object | None = None, bitmap: object | None = None
) -> Sample:
    """Return what the replies to query-status, query-guest-stats and query-skip-bitmap say.

    Raise AnswerError for replies of another shape.
    """
    said = _object(status, "query-status")
    sized = bool(_size(said, "guest-size"))  # 0 while no front-end is connected
    guest = _object(_object(stats, "query-guest-stats").get("stats", {}), "stats") if stats else {}
    shown = _object(bitmap, "query-skip-bitmap") if bitmap else {}
    pages = _object(shown.get("pages", {}), "pages")
    page_size = _size(shown, "page-size") or 0
    return Sample(
        name=name,
        connected=said.get("connected") is True,
        driver_running=said["driver-running"] is True if "driver-running" in said else None,
        guest_size=_size(said, "guest-size") if sized else None,
        actual=_size(said, "actual") if sized else None,
        target=_size(said, "target") if sized else None,
        resident=_size(said, "resident") if sized else None,
        available=_size(guest, "stat-available-memory"),
        free=_size(guest, "stat-free-memory"),
        ballooned=_pages(pages, "ballooned", page_size),
        reported=_pages(pages, "reported", page_size),
        restarts=_size(said, "restarts") or 0,
        broken=_broken(said.get("queues", [])),
        counters=_counters(said.get("counters", {})),
    )


def _object(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise AnswerError(f"{what}: not an object")
    return value


def _number(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise AnswerError(f"{what}: not a number from 0 to 2^64 - 1")
    return value


def _size(answer: Mapping[str, Any], key: str) -> int | None:
    return _number(answer[key], key) if key in answer else None


def _pages(pages: Mapping[str, Any], key: str, page_size: int) -> int | None:
    count = _size(pages, key)
    return None if count is None else count * page_size


def _broken(queues: object) -> tuple[tuple[int, str], ...]:
    if not isinstance(queues, list) or len(queues) > QUEUES_MAX:
        raise AnswerError("queues: not a list of queues")
    found = []
    for queue in queues:
        rule = _object(queue, "queues").get("broken")
        if rule is None:
            continue
        if not isinstance(rule, str) or not RULE.match(rule):
            raise AnswerError("queues: broken is not the name of a rule")
        found.append((_number(queue.get("index"), "index"), rule))
    return tuple(found)


def _counters(counters: object) -> dict[str, int]:
    found = _object(counters, "counters")
    if len(found) > COUNTERS_MAX:
        raise AnswerError(f"counters: more than {COUNTERS_MAX}")
    for name, value in found.items():
        if not isinstance(name, str) or not COUNTER.match(name):
            raise AnswerError("counters: not the name of a counter")
        _number(value, name)
    return dict(found)
