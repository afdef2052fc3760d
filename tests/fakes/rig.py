# SPDX-License-Identifier: Apache-2.0
"""A balloon with real rings in real memory, driven without a transport."""

from __future__ import annotations

from typing import Any

import numpy as np
from tests.fakes.driver import DriverRing, Element, make_driver
from tests.fakes.memory import Arena, make_memory

from vballoon.balloon import Balloon
from vballoon.balloon.device import ALL_FEATURES
from vballoon.errors import QueueError
from vballoon.memory import GuestMemory
from vballoon.virtio import DeviceQueue
from vballoon.virtqueue import make_virtqueue

MIB = 1 << 20
RING_SPACE = 4 * MIB
"""Size of the rings and buffers at the start of guest memory; the pages after it are free."""


class Rig:
    """The transport and the driver of one :class:`Balloon`."""

    def __init__(
        self,
        *,
        features: int = int(ALL_FEATURES),
        ring_features: int = 0,
        present: tuple[int, ...] = (0, 1, 2, 3, 4, 5),
        memory: GuestMemory | None = None,
        engine: str = "scalar",
        size: int = 64,
        **options: Any,
    ) -> None:
        self.memory = memory or make_memory((0, 64 * MIB))
        self.features = features
        self.ring_features = ring_features
        self.engine, self.size = engine, size
        self.arena = Arena(0x1000, RING_SPACE)
        self.balloon = Balloon(features, **options)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.balloon.events = lambda name, data: self.events.append((name, data))
        self.config_changes = 0
        self.interrupts: dict[int, int] = {}
        self.broken: dict[int, QueueError] = {}
        self.drivers: dict[int, DriverRing] = {}
        self.queues: dict[int, DeviceQueue] = {}
        self.balloon.attach(self)
        self.set_up(present)

    def set_up(self, present: tuple[int, ...]) -> None:
        """Set up the rings and start the device, as after DRIVER_OK."""
        self.drivers = {
            i: make_driver(self.memory, self.size, self.ring_features, arena=self.arena)
            for i in present
        }
        self.queues = {i: self._queue(i, driver) for i, driver in self.drivers.items()}
        self.balloon.start()

    def _queue(self, index: int, driver: DriverRing) -> DeviceQueue:
        ring = make_virtqueue(
            self.memory,
            self.size,
            driver.addresses,
            driver.features,
            engine=self.engine,  # type: ignore[arg-type]
        )

        def notify() -> None:
            self.interrupts[index] = self.interrupts.get(index, 0) + 1

        def on_broken(queue: DeviceQueue, error: QueueError) -> None:
            self.broken[queue.index] = error

        return DeviceQueue(index, ring, notify=notify, on_broken=on_broken)

    def config_changed(self) -> None:
        """Count a configuration change notification."""
        self.config_changes += 1

    def bytes(self, data: bytes) -> Element:
        """Return a device-readable element with *data*."""
        element = Element(self.arena.take(len(data)), len(data))
        self.memory.write(element.addr, data)
        return element

    def send(self, index: int, *chains: tuple[Element, ...]) -> list[tuple[int, int]]:
        """Make *chains* available on queue *index*, kick, and return the used buffers."""
        driver = self.drivers[index]
        for chain in chains:
            driver.add(*chain)
        driver.publish()
        return self.kick(index)

    def kick(self, index: int) -> list[tuple[int, int]]:
        """Have the device process queue *index* and return the used buffers."""
        while self.balloon.process(self.queues[index]):
            pass
        return self.drivers[index].collect()

    def pfns(self, *numbers: int) -> tuple[Element]:
        """Return an inflate or deflate buffer with page *numbers*."""
        return (self.bytes(np.array(numbers, "<u4").tobytes()),)

    def pages(self, pfn: int, count: int = 1) -> Element:
        """Return an element for a report or hint of *count* pages from *pfn* on."""
        return Element(pfn << 12, count << 12, True)

    def fill(self, pfn: int, count: int = 1, value: int = 0x5A) -> None:
        """Write *value* to pages, as the guest does."""
        self.memory.window(pfn << 12, count << 12)[:] = value

    def content(self, pfn: int) -> int:
        """Return the first byte of a page."""
        return int(self.memory.window(pfn << 12, 4096)[0])

    def event(self, name: str) -> dict[str, Any]:
        """Return the data of the latest event *name*."""
        return next(data for had, data in reversed(self.events) if had == name)
