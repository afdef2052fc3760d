# SPDX-License-Identifier: Apache-2.0
"""Driver side of a virtqueue: what both layouts have in common.

A ring consists of an area in guest memory and the driver's own bookkeeping.  The ``write_*`` and
``offer_*`` methods of each layout write any entry, well-formed or not.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from virtio_conformance.findings import Finding, Hang
from virtio_conformance.memory import GuestRam

__all__ = ("DriverRing", "Segment", "Used", "cut_up", "full_fence")

HISTORY = 6
"""Number of buffers that a report shows."""
SHOWN = 12
"""Number of segments of a buffer, and of entries of a ring, that a report shows."""

_lock = threading.Lock()


def full_fence() -> None:
    """Order earlier stores before later loads.

    Taking an uncontended lock is an atomic read-modify-write: LOCK-prefixed on x86-64, which is a
    full barrier; acquire-release on aarch64, where releasing and taking again orders both ways.
    """
    with _lock:
        pass


@dataclass(frozen=True)
class Segment:
    """One element of a buffer: guest-physical address, length in bytes, direction."""

    addr: int
    len: int
    write: bool = False


@dataclass(frozen=True)
class Used:
    """A buffer that came back: its head index (split) or id (packed), and the length written."""

    id: int
    len: int


class DriverRing(ABC):
    """One virtqueue as its driver sees it."""

    packed: bool
    size: int
    desc: NDArray[np.void]
    """The descriptors, live."""
    areas: tuple[int, int, int]
    """Guest-physical addresses: descriptors, driver area, device area."""

    def __init__(self, ram: GuestRam, size: int, *, event_idx: bool = False) -> None:
        self.ram = ram
        self.size = size
        self.event_idx = event_idx
        self.lengths: dict[int, int] = {}
        """Descriptors of each outstanding buffer, by id."""
        self.history: deque[str] = deque(maxlen=HISTORY)
        """The newest buffers as they were made available, for reports."""

    @abstractmethod
    def add(self, segments: Sequence[Segment], *, indirect: int = 0, publish: bool = True) -> int:
        """Make a buffer available and return its id.

        *indirect* is the guest-physical address of an indirect table to use (0: none).  With
        *publish* false the device cannot see the buffer until :meth:`publish`.
        """

    @abstractmethod
    def publish(self) -> None:
        """Make all added buffers visible to the device."""

    @abstractmethod
    def poll(self) -> list[Used]:
        """Return the buffers that the device returned since the last call."""

    @abstractmethod
    def wants_kick(self) -> bool:
        """Return whether the device wants a notification of the buffers published last."""

    @abstractmethod
    def interrupts(self, mode: str, after: int = 0) -> None:
        """Set *mode* of notifications: ``on``, ``off``, or ``event`` (*after* more buffers)."""

    @abstractmethod
    def used_count(self) -> int:
        """Return how many returned buffers :meth:`poll` has not read (packed: a lower bound)."""

    @property
    @abstractmethod
    def base(self) -> int:
        """The correct answer to GET_VRING_BASE once all published buffers have been used."""

    @property
    @abstractmethod
    def device_span(self) -> list[tuple[int, int]]:
        """Address ranges that the device may write: its own area, or for packed rings the ring."""

    @property
    @abstractmethod
    def publish_span(self) -> list[tuple[int, int]]:
        """Address ranges that :meth:`publish` writes."""

    def remember(self, name: int, segments: Sequence[Segment], indirect: int) -> None:
        """Record the segments of a buffer that is made available, for reports."""
        parts = [f"{s.addr:#x}+{s.len:#x}{'w' if s.write else 'r'}" for s in segments[:SHOWN]]
        parts += [f"and {len(segments) - SHOWN} more"] if len(segments) > SHOWN else []
        table = f" in a table at {indirect:#x}" if indirect else ""
        self.history.append(f"buffer {name}{table}: {', '.join(parts)}")

    def describe(self) -> list[str]:
        """Return lines for a report: the newest buffers, and the current content of the ring."""
        kind = "packed" if self.packed else "split"
        return [
            f"{kind} ring of {self.size} descriptors, {self.outstanding} buffers outstanding",
            *(f"  made available: {line}" for line in self.history),
            *(f"  now: {line}" for line in self.state()),
        ]

    @abstractmethod
    def state(self) -> list[str]:
        """Return the indices, flags and entries that the device has written."""

    @property
    def outstanding(self) -> int:
        """Buffers that the device has not returned."""
        return len(self.lengths)

    def take_back(self, ids: Used) -> Used:
        """Account for a returned buffer.  Raise :class:`Finding` if it was not outstanding."""
        if self.lengths.pop(ids.id, None) is None:
            raise Finding(f"buffer {ids.id} came back, but it was not with the device")
        return ids

    def collect(self, count: int, limit: float = 2.0) -> list[Used]:
        """Return *count* returned buffers.  Raise :class:`Hang` after *limit* seconds."""
        found: list[Used] = []
        deadline = time.monotonic() + limit
        pause = 0.0002
        while True:
            found += self.poll()
            if len(found) > count:
                raise Finding(f"{len(found)} buffers came back, expected {count}")
            if len(found) == count:
                return found
            if time.monotonic() > deadline:
                raise Hang(f"{len(found)} of {count} buffers came back within {limit} s")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.005)


def cut_up(start: int, size: int, sizes: Sequence[int], *, write: bool) -> Iterator[Segment]:
    """Yield segments that cover a range: one for each of *sizes*, then one for the rest."""
    left = size
    for part in sizes:
        if part >= left:
            break
        yield Segment(start, part, write)
        start, left = start + part, left - part
    yield Segment(start, left, write)
