# SPDX-License-Identifier: Apache-2.0
"""A guest's virtio-pci driver on top of the vfio-user client.

It works like a driver: it walks the capability list, reads where the structures are, and accesses
registers in their natural width.
"""

from __future__ import annotations

import os
from typing import Any

from tests.fakes.driver import DriverRing, make_driver
from tests.fakes.echo import Echo
from tests.fakes.memory import Arena
from tests.fakes.vfio_client import FakeClient, Ram, events

from vballoon.memory import GuestMemory, MemoryRegion
from vballoon.virtio_pci import DEFAULT_RING_FEATURES, VirtioPciFunction
from virtio_formats.pci import CapId, MsixCapability
from virtio_formats.vfio_user import IrqSetFlags, PciIrq, PciRegion
from virtio_formats.virtio import features as f
from virtio_formats.virtio.pci import CapType, CommonConfig, VirtioPciCap, VirtioPciNotifyCap
from virtio_formats.virtio.status import DeviceStatus as S

RAM_BASE = 0x100000
RAM_SIZE = 4 << 20
MODES = {"mapped": {}, "messages": {"mapped": False}, "count32": {"mapped": False, "narrow": True}}
"""Access to guest memory: by a descriptor, or by DMA messages in either layout."""


class Guest:
    """One guest on one function.  *mapped*: whether its RAM is sent with a descriptor."""

    def __init__(
        self, function: VirtioPciFunction, *, mapped: bool = True, narrow: bool = False
    ) -> None:
        self.function = function
        self.client = FakeClient(function, narrow=narrow)
        self.client.negotiate()
        self.ram = Ram(RAM_BASE, RAM_SIZE)
        self.client.map(self.ram, mapped=mapped)
        self.memory = GuestMemory(
            [
                MemoryRegion.map(
                    guest_phys_addr=RAM_BASE,
                    size=RAM_SIZE,
                    file_offset=0,
                    fd=os.dup(self.ram.fd),
                )
            ]
        )
        self.arena = Arena(RAM_BASE, RAM_SIZE)
        self.rings: dict[int, DriverRing] = {}
        self.vectors: list[int] = []
        self.intx = -1
        self.caps = self._find_capabilities()
        self.features = 0
        self.size = 16

    def _find_capabilities(self) -> dict[int, VirtioPciCap]:
        """Find the virtio structures by type; store the offset of the MSI-X capability."""
        found = {}
        offset = self.client.config(0x34, 1)
        while offset:
            head = self.client.read(PciRegion.CONFIG, offset, 16)
            if head[0] == CapId.VENDOR:
                cap = VirtioPciCap.parse(head)
                found[cap.cfg_type] = cap
                if cap.cfg_type == CapType.NOTIFY_CFG:
                    raw = self.client.read(PciRegion.CONFIG, offset, 20)
                    self.multiplier = VirtioPciNotifyCap.parse(raw).notify_off_multiplier
                if cap.cfg_type == CapType.PCI_CFG:
                    self.window = offset
            if head[0] == CapId.MSIX:
                self.msix = offset
                self.msix_cap = MsixCapability.parse(head[:12])
            if head[0] == CapId.EXPRESS:
                self.express = offset
            offset = head[1]
        return found

    # -- registers --------------------------------------------------------------------------------

    def get(self, name: str) -> int:
        """Return a field of the common configuration."""
        offset, size = self._field(name)
        cap = self.caps[CapType.COMMON_CFG]
        return int.from_bytes(self.client.read(cap.bar, cap.offset + offset, size), "little")

    def set(self, name: str, value: int, *, post: bool = True) -> None:
        """Write a field of the common configuration; 64-bit fields are written as two halves."""
        offset, size = self._field(name)
        cap = self.caps[CapType.COMMON_CFG]
        data = value.to_bytes(size, "little")
        for at in range(0, size, 4):
            part = data[at : at + 4]
            self.client.write(cap.bar, cap.offset + offset + at, part, post=post)

    def _field(self, name: str) -> tuple[int, int]:
        fields = CommonConfig.dtype().fields
        assert fields is not None
        dtype, offset, *_ = fields[name]
        return int(offset), dtype.itemsize

    def read_config(self, offset: int, size: int) -> bytes:
        """Return the device-specific configuration."""
        cap = self.caps[CapType.DEVICE_CFG]
        return self.client.read(cap.bar, cap.offset + offset, size)

    def write_config(self, offset: int, data: bytes) -> None:
        cap = self.caps[CapType.DEVICE_CFG]
        self.client.write(cap.bar, cap.offset + offset, data)

    def isr(self) -> int:
        cap = self.caps[CapType.ISR_CFG]
        return self.client.read(cap.bar, cap.offset, 1)[0]

    # -- a driver's life --------------------------------------------------------------------------

    def offered(self) -> int:
        """Return the device's 64-bit feature word."""
        word = 0
        for select in (0, 1):
            self.set("device_feature_select", select)
            word |= self.get("device_feature") << 32 * select
        return word

    def negotiate(self, features: int) -> int:
        """Negotiate up to FEATURES_OK and return the status."""
        self.set("device_status", 0)
        assert self.get("device_status") == 0
        self.set("device_status", S.ACKNOWLEDGE)
        self.set("device_status", S.ACKNOWLEDGE | S.DRIVER)
        for select in (0, 1):
            self.set("driver_feature_select", select)
            self.set("driver_feature", features >> 32 * select & 0xFFFFFFFF)
        self.set("device_status", S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK)
        self.features = features
        return self.get("device_status")

    def use_msix(self, count: int | None = None) -> None:
        """Enable MSI-X, with eventfds for the first *count* vectors (all)."""
        count = (self.msix_cap.control & 0x7FF) + 1 if count is None else count
        for fd in self.vectors:
            os.close(fd)
        self.vectors = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
        self.client.set_config(self.msix + 2, 0xC000, 2)  # enabled, function masked
        self.client.assign(PciIrq.MSIX, self.vectors)
        self.client.set_config(self.msix + 2, 0x8000, 2)

    def use_intx(self) -> None:
        self.intx = os.eventfd(0, os.EFD_NONBLOCK)
        self.client.assign(PciIrq.INTX, [self.intx])

    def unmask_intx(self) -> None:
        flags = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK
        self.client.set_irqs(PciIrq.INTX, flags, count=1)

    def set_up(self, index: int, *, vector: int | None = None, enable: bool = True) -> DriverRing:
        """Create a ring and enable it in the device."""
        ring = make_driver(self.memory, self.size, self.features, arena=self.arena)
        self.rings[index] = ring
        self.set("queue_select", index)
        self.set("queue_size", self.size)
        if vector is not None:
            self.set("queue_msix_vector", vector)
            assert self.get("queue_msix_vector") == vector
        self.set("queue_desc", ring.addresses.desc)
        self.set("queue_driver", ring.addresses.driver)
        self.set("queue_device", ring.addresses.device)
        if enable:
            self.set("queue_enable", 1)
        return ring

    def start(self, features: int | None = None, queues: tuple[int, ...] = (0,)) -> None:
        """Initialise the device with MSI-X: vector 0 for configuration, 1 + n for queue n."""
        features = f.mask(f.VIRTIO_F_VERSION_1) if features is None else features
        assert self.negotiate(features) & S.FEATURES_OK
        self.use_msix()
        self.set("config_msix_vector", 0)
        for index in queues:
            self.set_up(index, vector=1 + index)
        self.set("device_status", S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK | S.DRIVER_OK)

    def kick(self, index: int, *, data: int | None = None) -> None:
        """Ring the doorbell of a queue."""
        self.set("queue_select", index)
        cap = self.caps[CapType.NOTIFY_CFG]
        at = cap.offset + self.get("queue_notify_off") * self.multiplier
        value = index.to_bytes(2, "little") if data is None else data.to_bytes(4, "little")
        self.client.write(cap.bar, at, value, post=True)

    def interrupts(self) -> list[int]:
        """Return how often each vector was signalled since the last call."""
        return [events(fd) for fd in self.vectors]

    def close(self) -> None:
        """Power the guest off."""
        self.client.close()
        self.rings.clear()  # the windows of the rings keep the mapping and its descriptor open
        self.memory.close()
        self.ram.close()
        for fd in [*self.vectors, self.intx]:
            if fd >= 0:
                os.close(fd)


def send(guest: Guest, index: int, *texts: bytes, kick: bool = True) -> list[int]:
    """Make one buffer for each text available and return the addresses of the replies."""
    ring = guest.rings[index]
    answers = []
    for text in texts:
        out, back = ring.buffer(len(text)), ring.buffer(len(text), writable=True)
        guest.memory.write(out.addr, text)
        ring.add(out, back)
        answers.append(back.addr)
    ring.publish()
    if kick:
        guest.kick(index)
    return answers


def make(
    mode: str = "mapped", ring_features: int = DEFAULT_RING_FEATURES, **options: Any
) -> tuple[Echo, Guest]:
    echo = Echo()
    function = VirtioPciFunction(echo, ring_features=ring_features, **options)
    return echo, Guest(function, **MODES[mode])  # type: ignore[arg-type]


def end(guest: Guest) -> None:
    guest.close()
    guest.function.close()
