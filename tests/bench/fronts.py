# SPDX-License-Identifier: Apache-2.0
"""Front-ends that load a ``vballoon serve`` process: real sockets, real memory, full rings."""

from __future__ import annotations

import os
import select
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from tests.bench.load import FullRing, make_load
from tests.fakes.frontend import Frontend, Ring
from tests.fakes.memory import Arena, make_memory

import virtio_formats.vhost_user as vu
from vballoon.memory import GuestMemory
from virtio_conformance.vfio_user import Client
from virtio_conformance.virtio_pci import VirtioPci
from virtio_formats.vfio_user import Command, Header, HeaderFlags, PciIrq, RegionAccess
from virtio_formats.virtio import features as f
from virtio_formats.virtio.balloon import BalloonFeature

__all__ = ("BALLOON", "Front", "VfioFront", "VhostFront", "connect")

MIB = 1 << 20
BALLOON = int(
    BalloonFeature.MUST_TELL_HOST
    | BalloonFeature.STATS_VQ
    | BalloonFeature.FREE_PAGE_HINT
    | BalloonFeature.PAGE_REPORTING
)
SPACE = 64 * MIB
"""The first bytes of the guest: rings and buffers."""


@dataclass
class _Slice:
    """What DMA_MAP wants of a region."""

    guest: int
    size: int
    offset: int
    fd: int


class Front:
    """A driver with rings 0 … *rings* - 1, each a :class:`FullRing`, over some transport."""

    def __init__(
        self,
        path: Path,
        *,
        guest: int = 1024 * MIB,
        rings: int = 5,
        size: int = 128,
        ring_features: int = f.mask(f.VIRTIO_F_VERSION_1, f.VIRTIO_F_EVENT_IDX),
        balloon: int = BALLOON,
    ) -> None:
        self.memory: GuestMemory = make_memory((0, guest))
        self.arena = Arena(0x10000, SPACE - 0x10000)
        self.features = ring_features | balloon
        self.size = size
        self._connect(path)
        self.rings: list[FullRing] = []
        self.calls = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(rings)]
        for index in range(rings):
            load = make_load(self.memory, size, self.features, self.arena)
            self.rings.append(load)
            self._start(index, load)
        self._ready()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self, index: int, timeout: float = 10.0) -> int:
        """Wait for a notification of ring *index*; how many had piled up."""
        poll = select.poll()  # select() stops at descriptor 1024
        poll.register(self.calls[index], select.POLLIN)
        if not poll.poll(timeout * 1000):
            raise TimeoutError(f"ring {index}: no notification within {timeout} s")
        return os.eventfd_read(self.calls[index])

    def pending(self, index: int) -> int:
        """Notifications that have come meanwhile."""
        try:
            return os.eventfd_read(self.calls[index])
        except BlockingIOError:
            return 0

    def place(self, data: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Write *data* to guest memory and return the columns of one buffer."""
        at = self.arena.take(len(data))
        self.memory.write(at, data)
        return np.array([at]), np.array([len(data)])

    def kick(self, index: int) -> None:
        """Notify the device."""
        raise NotImplementedError

    def _connect(self, path: Path) -> None:
        raise NotImplementedError

    def _start(self, index: int, load: FullRing) -> None:
        raise NotImplementedError

    def _ready(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Leave; the guest's memory is gone."""
        for fd in self.calls:
            os.close(fd)
        self.rings.clear()
        self.memory.close()


class VhostFront(Front):
    """Over vhost-user."""

    def _connect(self, path: Path) -> None:
        self.frontend = Frontend.connect(path, self.memory)
        wanted = self.features | int(vu.VhostFeature.PROTOCOL_FEATURES)
        offered = self.frontend.get_u64(vu.Request.GET_FEATURES)
        assert not wanted & ~offered, f"not offered: {wanted & ~offered:#x}"
        self.frontend.negotiate(wanted=wanted)
        self.frontend.share_memory()
        self._kicks: list[int] = []

    def _start(self, index: int, load: FullRing) -> None:
        kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._kicks.append(kick)
        ring = Ring(index, load, kick, self.calls[index])  # type: ignore[arg-type]
        self.frontend.start_ring(ring)

    def _ready(self) -> None:
        self.frontend.status_ok()

    def kick(self, index: int) -> None:
        os.eventfd_write(self._kicks[index], 1)

    def close(self) -> None:
        self.frontend.close()
        for fd in self._kicks:
            os.close(fd)
        super().close()


class VfioFront(Front):
    """Over vfio-user: a kick is a message."""

    def _connect(self, path: Path) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(path))
        self.client = Client(sock, 10.0)
        self.client.negotiate()
        self.pci = VirtioPci(self.client)
        assert self.pci.accept(self.features), "the features were refused"
        for region in self.memory.regions:
            assert region.fd is not None
            slice_ = _Slice(region.guest_phys_addr, region.size, region.file_offset, region.fd)
            assert not self.client.map(slice_).failed  # type: ignore[arg-type]
        self.pci.set_config(4, 2, self.pci.config(4, 2) | 0x6)  # memory space, bus master
        self.pci.enable_msix()
        self._bells: list[bytes] = []  # complete messages: QEMU, which is C, builds one in no time

    def _start(self, index: int, load: FullRing) -> None:
        # A server that finds only zeroes where a driver's ring should be asks, by messages that
        # this client would have to answer, whether the memory is shared at all.
        self.memory.write(load.addresses.desc, b"ring")
        assert not self.client.set_irqs(PciIrq.MSIX, index + 1, [self.calls[index]]).failed
        a = load.addresses
        self.pci.set_queue(index, load.size, (a.desc, a.driver, a.device), index + 1)
        bar, offset = self.pci.notify_place(index)
        access = RegionAccess(offset=offset, region=bar, count=2).build()
        payload = access + index.to_bytes(2, "little")
        head = Header(
            id=0,
            command=Command.REGION_WRITE,
            size=Header.SIZE + len(payload),
            flags=int(HeaderFlags.NO_REPLY),
            error=0,
        )
        self._bells.append(head.build() + payload)

    def _ready(self) -> None:
        self.pci.driver_ok()

    def kick(self, index: int) -> None:
        """Send a posted write like QEMU: without a reply, so that processes can share this."""
        self.client.tap.send(self._bells[index], ())

    def close(self) -> None:
        self.client.close()
        super().close()


def connect(transport: str, path: Path, **how: int) -> Front:
    """Return a front-end of the transport, connected to the socket *path*."""
    kind = {"vhost-user": VhostFront, "vfio-user": VfioFront}[transport]
    return kind(path, **how)
