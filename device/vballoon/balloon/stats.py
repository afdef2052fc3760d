# SPDX-License-Identifier: Apache-2.0
"""Memory statistics: the queue that the device drives by giving the driver's one buffer back.

*Memory Balloon Device / Device Operation / Memory Statistics*.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from virtio_formats.virtio.balloon import BalloonStat, StatTag

if TYPE_CHECKING:
    from vballoon.balloon.counters import Counters
    from vballoon.virtio import DeviceQueue
    from vballoon.virtqueue import ChainBatch

__all__ = ("GuestStats", "StatsQueue")

STATS_BYTES_MAX = 256 * BalloonStat.SIZE
"""Entries read of one buffer: 16 tags are known, and 256 is what other devices allow.  The rest
of a longer buffer is ignored, so that its size buys the guest no work."""

_KNOWN = {int(tag) for tag in StatTag}


@dataclass(slots=True)
class GuestStats:
    """The latest statistics: tag → value (bytes or events), and when they arrived (UNIX time)."""

    values: dict[StatTag, int] = field(default_factory=dict)
    last_update: float = 0.0
    ballooned: int = 0
    """Size of the balloon in bytes when they arrived."""


class StatsQueue:
    """Holds the buffer that the driver keeps in the statsq, and reads what is in it."""

    def __init__(self, counters: Counters) -> None:
        self.latest = GuestStats()
        self._counters = counters
        self._held: tuple[DeviceQueue, np.uint16] | None = None
        self.updated = False
        """A buffer has arrived since the last request."""

    def handle(self, queue: DeviceQueue, batch: ChainBatch, ballooned: int = 0) -> None:
        """Keep the newest buffer, give back any other: the driver should have but one there.

        *ballooned* is the size of the balloon in bytes.
        """
        last = len(batch) - 1
        if last or self._held is not None:
            self._counters.bad_stats += last + (self._held is not None)
        self.release()
        if last:
            queue.give(batch.ids[:last])
        self._held = (queue, batch.ids[last])
        self._read(batch.readable(last, STATS_BYTES_MAX), ballooned)

    def request(self) -> bool:
        """Ask the driver for new statistics; False when it has no buffer with us."""
        held = self._held is not None
        if held:
            self.updated = False
            self.release()
        return held

    def release(self) -> None:
        """Give the held buffer back, if there is one."""
        if self._held is not None:
            (queue, head), self._held = self._held, None
            if queue.broken is None:
                queue.give(np.array([head], dtype=np.uint16))

    def reset(self) -> None:
        """Drop the statistics, which belong to the previous driver."""
        self._held = None
        self.latest = GuestStats()
        self.updated = False

    def _read(self, data: bytes, ballooned: int) -> None:
        surplus = len(data) % BalloonStat.SIZE
        self._counters.bad_stats += bool(surplus)
        entries = np.frombuffer(data[: len(data) - surplus], dtype=BalloonStat.dtype())
        pairs = zip(entries["tag"].tolist(), entries["val"].tolist(), strict=True)
        values = {}
        for tag, value in pairs:
            if tag in _KNOWN:
                values[StatTag(tag)] = value
            else:
                self._counters.stats_unknown_tags += 1
        self.latest = GuestStats(values, time.time(), ballooned)
        self._counters.stats_buffers += 1
        self.updated = True
