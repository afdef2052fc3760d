# SPDX-License-Identifier: Apache-2.0
"""Bring a device up over vfio-user, as QEMU and a guest's virtio-pci driver do it."""

from __future__ import annotations

import time

from virtio_conformance.findings import Closed, Finding, Hang
from virtio_conformance.observe import EventFd
from virtio_conformance.rig import Rig
from virtio_conformance.ring import DriverRing, Used
from virtio_conformance.vfio_user import Client
from virtio_conformance.virtio_pci import VirtioPci
from virtio_formats.vfio_user import Command, DeviceFlags, PciIrq
from virtio_formats.virtio.pci import NO_VECTOR

__all__ = ("VfioUserRig",)


class VfioUserRig(Rig):
    """A virtio-pci function that a vfio-user server serves."""

    transport = "vfio-user"
    map_memory = True
    with_fds = True
    use_msix = True

    def connect(self) -> None:
        """Open the connection and learn what is offered."""
        sock = self.target.connect()
        self.client = Client(sock, self.target.options.answer_limit, self.target.first_limit)
        self.target.taps.append(self.client.tap)
        self.client.ram = self.ram
        self.client.negotiate()
        if self.client.info().flags & DeviceFlags.RESET:  # a device keeps its state between clients
            self.client.do(Command.DEVICE_RESET)
        self.pci = VirtioPci(self.client)
        self._offered = self.pci.device_features()
        self.config_event = EventFd()
        self.vectors: dict[int, int] = {}

    @property
    def offered(self) -> int:
        """The virtio feature bits offered, as a mask."""
        return self._offered

    @property
    def discards(self) -> bool:
        """Whether freed pages become holes: not in memory that is accessed by messages."""
        return super().discards and self.with_fds

    def negotiate(self, features: int) -> None:
        """Negotiate features and share memory.  Raise a finding if either is refused."""
        if not self.pci.accept(features):
            raise Finding(f"features {features:#x} of {self._offered:#x} were refused")
        self.features = features
        if self.map_memory:
            self.map_all()
        self.pci.set_config(4, 2, self.pci.config(4, 2) | 0x6)  # memory space, bus master
        self.vector_count = self.client.irq_info(PciIrq.MSIX).count if self.use_msix else 0
        self.pci.enable_msix(bool(self.vector_count))
        if self.vector_count:
            self._vector(0, self.config_event)
            self.pci.set("config_msix_vector", 0)

    def map_all(self) -> None:
        """Map every region of memory, with descriptors or without."""
        for region in self.ram.regions:
            if self.client.map(region, with_fd=self.with_fds).failed:
                raise Finding(f"DMA_MAP of {region.guest:#x} failed")
        self.map_memory = False

    def _vector(self, number: int, event: EventFd) -> None:
        answer = self.client.set_irqs(PciIrq.MSIX, number, [event.fd])
        if answer.failed:
            raise Finding(f"SET_IRQS of vector {number} failed with errno {answer.error}")

    def start_ring(self, index: int, ring: DriverRing, *, base: int | None = None) -> None:
        """Program a ring and start it."""
        self.rings[index] = ring
        self.calls.setdefault(index, EventFd())
        vector = index + 1
        if vector < self.vector_count:
            self._vector(vector, self.calls[index])
        else:
            vector = 0 if self.vector_count else NO_VECTOR
        self.vectors[index] = vector
        self.pci.set("queue_select", index)
        limit = self.pci.get("queue_size")
        if ring.size > limit:
            raise Finding(f"queue {index} has at most {limit} descriptors")
        self.pci.set_queue(index, ring.size, ring.areas, vector)
        self.places = {**getattr(self, "places", {}), index: self.pci.notify_place(index)}

    def driver_ok(self) -> None:
        """Set DRIVER_OK."""
        self.pci.driver_ok()

    def kick(self, index: int) -> None:
        """Notify the device."""
        bar, offset = self.places[index]
        self.client.write(bar, offset, index.to_bytes(2, "little"))

    def collect(self, ring: DriverRing, count: int, limit: float | None = None) -> list[Used]:
        """Return *count* buffers, and serve DMA messages, which a server may always send."""
        found: list[Used] = []
        limit = self.target.options.answer_limit if limit is None else limit
        deadline = time.monotonic() + limit
        pause = 0.0002
        while True:
            found += ring.poll()
            if len(found) > count:
                raise Finding(f"{len(found)} buffers came back, expected {count}")
            if len(found) == count:
                return found
            if time.monotonic() > deadline:
                raise Hang(f"{len(found)} of {count} buffers came back within {limit} s")
            self.client.serve_for(pause)
            pause = min(pause * 1.5, 0.005)

    def main_quiet(self, seconds: float) -> None:
        """Give the device *seconds* to work, and serve its messages."""
        deadline = time.monotonic() + seconds
        while not self.client.tap.closed and (left := deadline - time.monotonic()) > 0:
            try:
                self.client.serve_for(left)
            except Closed:
                return

    def usable(self) -> bool:
        """Return whether the connection answers."""
        return self.client.usable()

    def read_config(self, offset: int, size: int) -> bytes:
        """Return *size* bytes of the device configuration."""
        return self.pci.read_device(offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        """Write device configuration."""
        self.pci.write_device(offset, data)

    def leave(self) -> None:
        """Close the connection."""
        self.client.close()
        self.config_event.close()
