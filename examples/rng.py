# SPDX-License-Identifier: Apache-2.0
"""A virtio entropy device: the same few lines on vhost-user and on vfio-user.

python examples/rng.py --vfio-user rng.sock
qemu-system-x86_64 … -device '{"driver":"vfio-user-pci",
    "socket":{"type":"unix","path":"rng.sock"}}'
"""

from __future__ import annotations

import os
import sys

import numpy as np

from vballoon.virtio import DeviceQueue, VirtioDevice
from vballoon.virtqueue import ChainBatch

LARGEST = 1 << 16
"""Bytes of randomness for one buffer, however large the driver made it."""


class Rng(VirtioDevice):
    """Entropy Device (virtio device ID 4): fills every buffer with random bytes."""

    device_id = 4
    num_queues = 1
    queue_size_max = 64
    pci_class = 0x00FF00

    @property
    def device_features(self) -> int:
        return 0

    def read_config(self) -> bytes:
        return b""

    def handle(self, queue: DeviceQueue, batch: ChainBatch) -> None:
        sizes = np.minimum(batch.writable_size(), LARGEST)
        written = [batch.write(i, os.urandom(size)) for i, size in enumerate(sizes.tolist())]
        queue.give(batch.ids, np.array(written, np.uint32))


def main(argv: list[str]) -> int:
    """``--vfio-user PATH`` serves the device there."""
    match argv:
        case ["--vfio-user", path]:
            from vballoon.virtio_pci import VirtioPciFunction
            from vfio_user import run_program

            return run_program(VirtioPciFunction(Rng()), ["--socket-path", path])
        case _:
            print(main.__doc__, file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
