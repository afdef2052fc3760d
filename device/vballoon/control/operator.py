# SPDX-License-Identifier: Apache-2.0
"""Protocols for the parts of the device and the transports that the control socket uses."""

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
        """Statistics tag to value."""

    @property
    def last_update(self) -> float:
        """UNIX time of the newest statistics in seconds, 0 before the first."""


class ControlledBalloon(Protocol):
    """The part of the balloon that commands use."""

    events: Callable[[str, dict[str, Any]], None]
    """Called with each event, for example ``BALLOON_CHANGE`` or ``QUEUE_BROKEN``."""

    @property
    def skipmap(self) -> SkipMap:
        """The skip map of the memory that is attached now."""

    @property
    def counters(self) -> Any:
        """A dataclass of running totals."""

    @property
    def ram_bytes(self) -> int:
        """Size of guest memory in bytes, 0 while no front-end is connected."""

    stats_interval: int

    @property
    def driver_running(self) -> bool:
        """Whether any ring runs.  If none does, the state may be that of an earlier boot."""

    @property
    def actual_bytes(self) -> int:
        """Size of guest memory in bytes, excluding the balloon."""

    @property
    def guest_bytes(self) -> int:
        """The guest's memory in bytes, the balloon included."""

    @property
    def target_bytes(self) -> int:
        """The size in bytes that the guest is asked to have."""

    @property
    def floor_bytes(self) -> int:
        """The lowest target in bytes that is accepted without *force*."""

    def set_target(self, value: int, *, force: bool = ...) -> None:
        """Ask the guest to have *value* bytes.  Raise UsageError for a careless target."""

    def stats(self) -> _Statistics:
        """Return the latest statistics."""

    def request_stats(self) -> bool:
        """Request new statistics.  Return False when the driver has made no buffer available."""

    def start_hinting(self, *, hold: bool = ...) -> int:
        """Begin a hinting round and return its id."""

    def stop_hinting(self) -> None:
        """End hinting."""

    def start_walk(self, min_order: int = ...) -> int:
        """Begin a walk and return its id."""

    def stop_walk(self) -> None:
        """End the walk."""


class ControlledTransport(Protocol):
    """The part of a transport that commands use."""

    def status(self) -> Any:
        """Return a dataclass of the connection, the negotiated features and the queues."""


@dataclass(slots=True)
class Operator:
    """The objects that a command can use."""

    balloon: ControlledBalloon
    transport: ControlledTransport
    stop: Callable[[], None] = lambda: None
    """Ends the program; called after the reply was sent."""
    interval_changed: Callable[[], None] = lambda: None
    started: float = field(default_factory=time.monotonic)

    @property
    def stats_interval(self) -> int:
        """Seconds between requests for statistics; 0 disables them."""
        return self.balloon.stats_interval

    @stats_interval.setter
    def stats_interval(self, seconds: int) -> None:
        self.balloon.stats_interval = seconds

    def require_memory(self) -> SkipMap:
        """Return the skip map.  Raise UsageError while no guest memory is attached."""
        if not self.balloon.ram_bytes:
            raise UsageError("no guest memory yet: wait until a front-end has connected")
        return self.balloon.skipmap

    def require_config_space(self) -> None:
        """Raise UsageError if the front-end shows the guest no configuration space."""
        status = self.transport.status()
        if (
            status.transport == "vhost-user"
            and status.connected
            and "CONFIG" not in status.protocol_features
        ):
            raise UsageError(
                "the front-end shows the guest no configuration space, so the guest cannot see a "
                "target: add config_size=24 to QEMU's -device option"
            )


def plain(value: Any) -> Any:
    """Return *value* in JSON types: dataclasses become objects, enumerations their values."""
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
