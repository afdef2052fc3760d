# SPDX-License-Identifier: Apache-2.0
"""What a buffer costs on a ring: take and give, both engines, every kind of ring.

A figure is the best of several rounds, in nanoseconds a buffer, of one full queue taken, given
back and (where asked for) announced.  It is processor time, so that a busy machine does not count
against the slower engine, and what counts is the ratio of the two, measured in turn in one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tests.fakes.driver import DriverRing, Element, PackedDriver, SplitDriver, make_driver
from tests.fakes.memory import make_memory

from vballoon.virtqueue import Virtqueue, make_virtqueue
from virtio_formats.virtio import features as f

MIB = 1 << 20
HIGH = 1 << 32
REGIONS = ((0, 64 * MIB), (HIGH, 64 * MIB))
"""Guest memory below and above 4 GiB, as every larger PC has it."""

Engine = Literal["scalar", "batch"]


@dataclass(frozen=True)
class Shape:
    """A kind of ring and of buffers: *descriptors* to a buffer, in a table or not."""

    name: str
    features: int = 0
    descriptors: int = 1
    indirect: bool = False
    writable: bool = True


SHAPES = (
    Shape("split", f.mask(f.VIRTIO_F_EVENT_IDX)),
    Shape("split, readable", f.mask(f.VIRTIO_F_EVENT_IDX), writable=False),
    Shape("split, in order", f.mask(f.VIRTIO_F_EVENT_IDX, f.VIRTIO_F_IN_ORDER)),
    Shape("split, chains of 4", f.mask(f.VIRTIO_F_EVENT_IDX), 4),
    Shape("split, tables of 4", f.mask(f.VIRTIO_F_INDIRECT_DESC), 4, indirect=True),
    Shape("packed", f.mask(f.VIRTIO_F_RING_PACKED, f.VIRTIO_F_EVENT_IDX)),
    Shape("packed, lists of 4", f.mask(f.VIRTIO_F_RING_PACKED), 4),
    Shape(
        "packed, tables of 4",
        f.mask(f.VIRTIO_F_RING_PACKED, f.VIRTIO_F_INDIRECT_DESC),
        4,
        indirect=True,
    ),
)


class Bench:
    """A queue of *size* descriptors, full of buffers, that can be filled again at no cost."""

    def __init__(self, shape: Shape, engine: Engine, size: int = 1024) -> None:
        self.memory = make_memory(*REGIONS)
        self.driver: DriverRing = make_driver(self.memory, size, shape.features)
        self.buffers = size if shape.indirect else size // shape.descriptors
        heads = [
            self.driver.add(*_elements(i, shape), indirect=shape.indirect)
            for i in range(self.buffers)
        ]
        if isinstance(self.driver, SplitDriver):
            self.driver.avail_ring[:] = np.resize(heads, size)
        self.driver.publish()
        self.queue: Virtqueue = make_virtqueue(
            self.memory, size, self.driver.addresses, shape.features, engine=engine
        )
        self._full = self.driver.desc.copy() if isinstance(self.driver, PackedDriver) else None
        self.written = np.zeros(self.buffers, np.uint32)

    def refill(self) -> None:
        """Make the same buffers available again, like a driver that reuses them at once."""
        if isinstance(self.driver, SplitDriver):
            self.driver.next_avail = (self.driver.next_avail + self.buffers) % 65536
            self.driver.publish()
        elif isinstance(self.driver, PackedDriver) and self._full is not None:
            self._full["flags"] ^= 0x8080
            self.driver.desc[:] = self._full

    def round(self, handle: Callable[[object], object] | None = None) -> int:
        """Take everything, *handle* the batch, give it back; nanoseconds of processor time."""
        begin = time.thread_time_ns()
        batch = self.queue.take()
        if handle is not None:
            handle(batch)
        self.queue.give(batch.ids, self.written[: len(batch)])
        self.queue.should_notify()
        spent = time.thread_time_ns() - begin
        assert len(batch) == self.buffers, "the queue was not taken whole"
        return spent

    def best(self, rounds: int, handle: Callable[[object], object] | None = None) -> float:
        """Return the minimum over *rounds*, in nanoseconds for each buffer."""
        spent = []
        for _ in range(rounds):
            spent.append(self.round(handle))
            self.refill()
        return min(spent) / self.buffers

    def close(self) -> None:
        """Give the guest's memory back."""
        self.memory.close()


def _elements(i: int, shape: Shape) -> list[Element]:
    pages = range(i * shape.descriptors, (i + 1) * shape.descriptors)
    return [
        Element((HIGH if p % 3 == 0 else 32 * MIB) + 4096 * (p % 4096), 4096, shape.writable)
        for p in pages
    ]


def measure(shape: Shape, size: int = 1024, rounds: int = 300) -> tuple[float, float]:
    """Nanoseconds a buffer with the scalar and with the batch engine, measured in turn."""
    scalar, batch = Bench(shape, "scalar", size), Bench(shape, "batch", size)
    try:
        best = (float("inf"), float("inf"))
        for _ in range(5):
            best = (
                min(best[0], scalar.best(2)),
                min(best[1], batch.best(rounds // 5)),
            )
        return best
    finally:
        scalar.close()
        batch.close()


def main() -> None:
    """Print the table."""
    print(f"{'queue of 1024':24} {'scalar':>9} {'batch':>9} {'ratio':>7}   ns a buffer")
    for shape in SHAPES:
        scalar, batch = measure(shape)
        print(f"{shape.name:24} {scalar:9.0f} {batch:9.1f} {scalar / batch:6.0f}x")


if __name__ == "__main__":
    main()
