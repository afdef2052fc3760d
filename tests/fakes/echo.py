# SPDX-License-Identifier: Apache-2.0
"""A small virtio device for tests: queue 0 echoes, queue 1 holds one buffer at a time."""

from __future__ import annotations

import numpy as np

from vballoon.virtio import DeviceQueue, Transport, VirtioDevice
from vballoon.virtqueue import ChainBatch


class Echo(VirtioDevice):
    """Copy the readable part, reversed, into the writable part.  Record all calls in ``log``."""

    device_id = 42
    num_queues = 2
    queue_size_max = 64
    pci_class = 0x078000
    FEATURE = 1 << 5

    def __init__(self) -> None:
        self.log: list[str] = []
        self.config = bytearray(b"\1\2\3\4\5\6")
        self.held: tuple[DeviceQueue, np.ndarray] | None = None
        self.fail_with: Exception | None = None
        self.echoed = 0

    @property
    def device_features(self) -> int:
        return self.FEATURE

    def read_config(self) -> bytes:
        return bytes(self.config)

    def write_config(self, offset: int, data: bytes) -> None:
        self.log.append(f"config {offset} {data.hex()}")
        self.config[offset : offset + len(data)] = data

    def attach(self, transport: Transport) -> None:
        super().attach(transport)
        self.log.append("attach")

    def start(self) -> None:
        assert self.transport is not None
        self.log.append(f"start {sorted(self.transport.queues)}")

    def handle(self, queue: DeviceQueue, batch: ChainBatch) -> None:
        if self.fail_with is not None:
            raise self.fail_with
        if queue.index == 1:
            self.release()
            self.held = queue, batch.ids[-1:]
            queue.give(batch.ids[:-1])
            return
        written = [batch.write(i, batch.readable(i, 4096)[::-1]) for i in range(len(batch))]
        self.echoed += len(batch)
        queue.give(batch.ids, np.array(written, np.uint32))

    def release(self) -> None:
        """Give the held buffer back."""
        held, self.held = self.held, None
        if held is not None:
            held[0].give(held[1])

    def stop(self) -> None:
        self.log.append("stop")
        self.release()

    def reset(self) -> None:
        self.log.append("reset")
        self.held = None

    def memory_changed(self) -> None:
        assert self.transport is not None
        self.log.append(f"memory {self.transport.memory.size:#x}")

    def detach(self) -> None:
        super().detach()
        self.log.append("detach")
