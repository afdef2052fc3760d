# SPDX-License-Identifier: Apache-2.0
"""What the operator's socket needs of the device and of the transports, and nothing more."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from vballoon.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vballoon.skipmap import SkipMap

__all__ = ("ControlledBalloon", "ControlledTransport", "Operator", "plain")


class _Statistics(Protocol):
    @property
    def values(self) -> Mapping[Any, int]:
        """Tag → value."""

    @property
    def last_update(self) -> float:
        """UNIX time, 0 before the first."""


class ControlledBalloon(Protocol):
    """The balloon as the operator sees it."""

    events: Callable[[str, dict[str, Any]], None]
    """Told of ``BALLOON_CHANGE``, ``ROUND_COMPLETED``, ``QUEUE_BROKEN`` …"""

    @property
    def skipmap(self) -> SkipMap:
        """The map of the memory that is attached now."""

    @property
    def counters(self) -> Any:
        """A dataclass of running totals."""

    @property
    def ram_bytes(self) -> int:
        """Guest memory, 0 while there is none."""

    @property
    def actual_bytes(self) -> int:
        """Guest memory less what is in the balloon."""

    def set_target(self, value: int) -> None:
        """Ask the guest to have *value* bytes."""

    def stats(self) -> _Statistics:
        """The latest statistics."""

    def request_stats(self) -> bool:
        """Ask the driver for new ones; False when it has no buffer with the device."""

    def start_hinting(self, *, hold: bool = ...) -> int:
        """Begin a hinting round; returns its id."""

    def stop_hinting(self) -> None:
        """End hinting."""

    def start_walk(self, min_order: int = ...) -> int:
        """Begin a walk; returns its id."""

    def stop_walk(self) -> None:
        """End the walk."""


class ControlledTransport(Protocol):
    """A transport as the operator sees it."""

    def status(self) -> Any:
        """A dataclass: what is connected, negotiated and running."""


@dataclass(slots=True)
class Operator:
    """Everything that a command can reach."""

    balloon: ControlledBalloon
    transport: ControlledTransport
    stop: Callable[[], None] = lambda: None
    """Ends the program, after the reply was sent."""
    stats_interval: int = 0
    """Seconds between requests for statistics, 0: never."""
    interval_changed: Callable[[], None] = lambda: None
    started: float = field(default_factory=time.monotonic)

    def require_memory(self) -> SkipMap:
        """The skip map; raises :class:`~vballoon.errors.UsageError` while there is no guest."""
        if not self.balloon.ram_bytes:
            raise UsageError("no guest memory yet: wait until a front-end has connected")
        return self.balloon.skipmap


def plain(value: Any) -> Any:
    """*value* as JSON knows it: dataclasses become objects, enumerations their values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (f.name for f in dataclasses.fields(value))
        return {name.replace("_", "-"): plain(getattr(value, name)) for name in names}
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, dict):
        return {str(plain(k)): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)
