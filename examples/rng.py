# SPDX-License-Identifier: Apache-2.0
"""A virtio entropy device that runs on vhost-user and on vfio-user.

    python examples/rng.py --vfio-user rng.sock
    qemu-system-x86_64 … -device
        '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"rng.sock"}}'

    python examples/rng.py --vhost-user rng.sock
    qemu-system-x86_64 … -chardev socket,id=rng,path=rng.sock
        -device vhost-user-test-device-pci,chardev=rng,virtio-id=4,num_vqs=1,vq_size=64

The guest shows it as /dev/hwrng.
"""

from __future__ import annotations

import asyncio
import os
import sys

import numpy as np

from vballoon.vhost_user import VhostUserServer
from vballoon.virtio import DeviceQueue, VirtioDevice
from vballoon.virtio_pci import VirtioPciFunction
from vballoon.virtqueue import ChainBatch
from vfio_user import run_program

LARGEST = 1 << 16
"""Maximum number of random bytes for one buffer."""


class Rng(VirtioDevice):
    """Entropy Device (virtio device ID 4), which fills every buffer with random bytes."""

    device_id = 4
    num_queues = 1
    queue_size_max = 64
    pci_class = 0x00FF00

    @property
    def device_features(self) -> int:
        """Return 0: the device type defines no features."""
        return 0

    def read_config(self) -> bytes:
        """Return an empty configuration space."""
        return b""

    def handle(self, queue: DeviceQueue, batch: ChainBatch) -> None:
        """Fill a batch of buffers and give them back."""
        sizes = np.minimum(batch.writable_size(), LARGEST)
        written = [batch.write(i, os.urandom(size)) for i, size in enumerate(sizes.tolist())]
        queue.give(batch.ids, np.array(written, np.uint32))


def main(argv: list[str]) -> int:
    """Run the device.  Usage: rng.py --vhost-user PATH | --vfio-user PATH [--intx]."""
    match argv:
        case ["--vfio-user", path, *rest] if rest in ([], ["--intx"]):
            function = VirtioPciFunction(Rng(), msix=not rest)
            return run_program(function, ["--socket-path", path])
        case ["--vhost-user", path]:
            asyncio.run(VhostUserServer(Rng(), path=path).serve())
            return 0
    print(main.__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
