# SPDX-License-Identifier: Apache-2.0
"""A modern virtio-pci driver on top of the vfio-user client."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from virtio_conformance.findings import Finding
from virtio_conformance.vfio_user import Client
from virtio_formats.pci import CapId, Status
from virtio_formats.vfio_user import PciRegion
from virtio_formats.virtio.pci import CapType, CommonConfig
from virtio_formats.virtio.status import DeviceStatus as S

__all__ = ("Capability", "Structure", "VirtioPci")

CONFIG = PciRegion.CONFIG


@dataclass(frozen=True)
class Capability:
    """One entry of the PCI capability list: its offset, its id, its raw bytes."""

    at: int
    id: int
    raw: bytes


@dataclass(frozen=True)
class Structure:
    """One virtio structure: its capability, and the location that this gives."""

    cap: Capability
    type: int
    bar: int
    id: int
    offset: int
    length: int

    @property
    def multiplier(self) -> int:
        """notify_off_multiplier of a notification capability."""
        return int(struct.unpack_from("<I", self.cap.raw, 16)[0])


class VirtioPci:
    """One function: its capabilities, the common registers, and the device's configuration."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.capabilities = list(self._capabilities())
        self.structures = [structure(cap) for cap in self.capabilities if cap.id == CapId.VENDOR]

    # -- configuration space -----------------------------------------------------------------

    def config(self, offset: int, size: int) -> int:
        """Return a little-endian register of PCI configuration space."""
        return int.from_bytes(self.client.read(CONFIG, offset, size), "little")

    def set_config(self, offset: int, size: int, value: int) -> None:
        """Write a register of PCI configuration space."""
        self.client.write(CONFIG, offset, value.to_bytes(size, "little"))

    def _capabilities(self) -> Iterator[Capability]:
        if not self.config(6, 2) & Status.CAP_LIST:
            return
        at, seen = self.config(0x34, 1) & 0xFC, set[int]()
        while at:
            if at < 0x40 or at in seen:
                raise Finding(f"the capability list points to {at:#x} (loop or header)")
            seen.add(at)
            cap_id, following, length = self.client.read(CONFIG, at, 3)
            size = length if cap_id == CapId.VENDOR else 12 if cap_id == CapId.MSIX else 2
            if at + size > 256:
                raise Finding(f"the capability at {at:#x} has {size} bytes")
            yield Capability(at, cap_id, self.client.read(CONFIG, at, max(size, 2)))
            at = following & 0xFC

    def find(self, kind: int) -> Structure:
        """Return the first structure of a type.  Raise a finding if there is none."""
        for found in self.structures:
            if found.type == kind:
                return found
        raise Finding(f"no virtio capability of type {CapType(kind).name}")

    # -- registers ---------------------------------------------------------------------------

    def get(self, name: str) -> int:
        """Return a common configuration register, by its name in the standard."""
        offset, size = _register(name)
        common = self.find(CapType.COMMON_CFG)
        return int.from_bytes(self.client.read(common.bar, common.offset + offset, size), "little")

    def set(self, name: str, value: int) -> None:
        """Write a common configuration register; 64-bit ones in two halves, as drivers do."""
        offset, size = _register(name)
        common = self.find(CapType.COMMON_CFG)
        for part in range(0, size, 4):
            width = min(4, size)
            data = (value >> 8 * part & (1 << 8 * width) - 1).to_bytes(width, "little")
            self.client.write(common.bar, common.offset + offset + part, data)

    def device_features(self) -> int:
        """Return the 64 feature bits that are offered."""
        found = 0
        for select in (0, 1):
            self.set("device_feature_select", select)
            found |= self.get("device_feature") << 32 * select
        return found

    def set_features(self, features: int) -> None:
        """Write the 64 feature bits of the driver."""
        for select in (0, 1):
            self.set("driver_feature_select", select)
            self.set("driver_feature", features >> 32 * select & 0xFFFFFFFF)

    def reset(self) -> None:
        """Write 0 to the status and wait until it reads 0."""
        self.set("device_status", 0)
        for _ in range(200):
            if self.get("device_status") == 0:
                return
        raise Finding("device_status does not become 0 after a reset")

    def accept(self, features: int) -> bool:
        """Reset and negotiate up to FEATURES_OK.  Return whether the device accepted."""
        self.reset()
        self.set("device_status", S.ACKNOWLEDGE)
        self.set("device_status", S.ACKNOWLEDGE | S.DRIVER)
        self.set_features(features)
        self.set("device_status", S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK)
        return bool(self.get("device_status") & S.FEATURES_OK)

    def driver_ok(self) -> None:
        """Set DRIVER_OK, the last step of initialisation."""
        self.set("device_status", S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK | S.DRIVER_OK)

    def set_queue(
        self,
        index: int,
        size: int,
        areas: tuple[int, int, int],
        vector: int,
        *,
        enable: bool = True,
    ) -> None:
        """Program one queue and enable it."""
        self.set("queue_select", index)
        self.set("queue_size", size)
        self.set("queue_msix_vector", vector)
        for name, area in zip(("queue_desc", "queue_driver", "queue_device"), areas, strict=True):
            self.set(name, area)
        if enable:
            self.set("queue_enable", 1)

    def notify_place(self, index: int) -> tuple[int, int]:
        """Return BAR and offset of a queue's notification register."""
        self.set("queue_select", index)
        notify = self.find(CapType.NOTIFY_CFG)
        return notify.bar, notify.offset + self.get("queue_notify_off") * notify.multiplier

    # -- device configuration ----------------------------------------------------------------

    def read_device(self, offset: int, size: int) -> bytes:
        """Return *size* bytes of the device configuration."""
        place = self.find(CapType.DEVICE_CFG)
        return self.client.read(place.bar, place.offset + offset, size)

    def write_device(self, offset: int, data: bytes) -> None:
        """Write bytes of the device configuration."""
        place = self.find(CapType.DEVICE_CFG)
        self.client.write(place.bar, place.offset + offset, data)

    def enable_msix(self, on: bool = True) -> None:
        """Set or clear MSI-X Enable in the capability, if there is one."""
        for cap in self.capabilities:
            if cap.id == CapId.MSIX:
                control = self.config(cap.at + 2, 2) & 0x7FFF
                self.set_config(cap.at + 2, 2, control | (0x8000 if on else 0))


def structure(cap: Capability) -> Structure:
    """Return the structure that a vendor capability (``struct virtio_pci_cap``) describes."""
    if len(cap.raw) < 16:
        raise Finding(f"the vendor capability at {cap.at:#x} has {len(cap.raw)} bytes")
    kind, bar, ident = cap.raw[3], cap.raw[4], cap.raw[5]
    offset, length = struct.unpack_from("<II", cap.raw, 8)
    return Structure(cap, kind, bar, ident, offset, length)


def _register(name: str) -> tuple[int, int]:
    fields = CommonConfig.dtype().fields
    assert fields is not None
    kind, offset = fields[name][:2]
    return int(offset), kind.itemsize
