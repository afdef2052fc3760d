# SPDX-License-Identifier: Apache-2.0
"""A virtio device for tests: it writes what it reads, and can hold or reorder buffers."""

from __future__ import annotations

import random
from collections import deque

import numpy as np

from vballoon.errors import ProtocolError
from vballoon.virtio import DeviceQueue, VirtioDevice
from vballoon.virtqueue import ChainBatch

F_ECHO = 1 << 0
F_UPPER = 1 << 1


class EchoDevice(VirtioDevice):
    """Copy the readable part of each buffer into its writable part.

    *hold* buffers of each queue are held until more arrive or the device stops; *shuffle* gives
    them back in another order.  ``log`` records the calls of the transport.
    """

    device_id = 42
    num_queues = 3

    def __init__(self, *, hold: int = 0, shuffle: int | None = None) -> None:
        self.hold = hold
        self.random = random.Random(shuffle) if shuffle is not None else None
        self.config = bytearray(range(16))
        self.log: list[str] = []
        self.started_with: list[tuple[int, ...]] = []
        self.seen: list[bytes] = []
        self.state = b"state"
        self.fault: Exception | None = None
        self._held: dict[int, deque[tuple[int, ChainBatch, int]]] = {}

    @property
    def device_features(self) -> int:
        return F_ECHO | F_UPPER

    def read_config(self) -> bytes:
        return bytes(self.config)

    def write_config(self, offset: int, data: bytes) -> None:
        """Write *data*; only bytes 4 to 7 are writable."""
        self.log.append(f"write_config {offset} {len(data)}")
        for at, value in enumerate(data, offset):
            if 4 <= at < 8:
                self.config[at] = value

    def attach(self, transport) -> None:
        super().attach(transport)
        self.log.append("attach")

    def start(self) -> None:
        self.log.append("start")
        self.started_with.append(tuple(sorted(self.transport.queues)))

    def handle(self, queue: DeviceQueue, batch: ChainBatch) -> None:
        if self.fault is not None:
            raise self.fault
        held = self._held.setdefault(queue.index, deque())
        for i in range(len(batch)):
            self.seen.append(batch.readable(i, 64))
            held.append((int(batch.ids[i]), batch, i))
        self._give(queue, len(held) - self.hold)

    def _give(self, queue: DeviceQueue, count: int) -> None:
        held = self._held.get(queue.index, deque())
        if self.random is not None:
            order = list(held)
            self.random.shuffle(order)
            held = self._held[queue.index] = deque(order)
        done = [held.popleft() for _ in range(max(0, min(count, len(held))))]
        if not done:
            return
        written = [batch.write(i, self.seen_of(batch, i)) for _, batch, i in done]
        queue.give(np.array([d[0] for d in done], np.uint16), np.array(written, np.uint32))

    def seen_of(self, batch: ChainBatch, i: int) -> bytes:
        return batch.readable(i, 64)

    def stop(self) -> None:
        self.log.append("stop")
        for queue in self.transport.queues.values():
            if queue.broken is None:
                self._give(queue, len(self._held.get(queue.index, ())))
        self._held.clear()

    def reset(self) -> None:
        self.log.append("reset")
        self._held.clear()

    def memory_changed(self) -> None:
        self.log.append(f"memory_changed {len(self.transport.memory.regions)}")

    def detach(self) -> None:
        super().detach()
        self.log.append("detach")

    def save(self) -> bytes:
        return self.state

    def load(self, state: bytes) -> None:
        if state.startswith(b"bad"):
            raise ProtocolError("state-format", "it is bad")
        self.state = state
