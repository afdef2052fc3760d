# SPDX-License-Identifier: Apache-2.0
"""Layout of the function: BARs, configuration space and the capability list.

Virtio 1.4, *PCI Device Layout* and *PCI Device Discovery*.  BAR 0 holds the virtio structures,
each in a page of its own; BAR 2 the MSI-X table and the pending bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from vballoon.memory import PAGE_SIZE
from vfio_user import ConfigSpace
from virtio_formats.pci import (
    ExpressCapability,
    MsixCapability,
    MsixControl,
    MsixTableEntry,
    PowerManagementCapability,
)
from virtio_formats.virtio.pci import (
    MODERN_DEVICE_ID_BASE,
    MODERN_REVISION,
    VENDOR_ID,
    CapType,
    CommonConfig,
    VirtioPciCap,
    VirtioPciCfgCap,
    VirtioPciNotifyCap,
)

__all__ = (
    "COMMON_PAGE",
    "DEVICE_PAGE",
    "ISR_PAGE",
    "MSIX_BAR",
    "NOTIFY_MULTIPLIER",
    "NOTIFY_PAGE",
    "STRUCTURES_BAR",
    "STRUCTURES_SIZE",
    "Capabilities",
    "MsixLayout",
    "build_config",
)

STRUCTURES_BAR, MSIX_BAR = 0, 2
COMMON_PAGE, ISR_PAGE, DEVICE_PAGE, NOTIFY_PAGE = 0, PAGE_SIZE, 2 * PAGE_SIZE, 3 * PAGE_SIZE
STRUCTURES_SIZE = 4 * PAGE_SIZE

NOTIFY_MULTIPLIER = 4
"""Bytes between the doorbells of two queues: room for NOTIFICATION_DATA, a power of two."""


@dataclass(frozen=True)
class MsixLayout:
    """Table and pending bits in their BAR, in bytes.  Without vectors there is no MSI-X."""

    vectors: int

    @property
    def table_size(self) -> int:
        """Bytes of the table."""
        return self.vectors * MsixTableEntry.SIZE

    @property
    def pba(self) -> int:
        """Where the pending bits begin: in a page of their own."""
        return self.table_size + -self.table_size % PAGE_SIZE

    @property
    def pba_size(self) -> int:
        """Bytes of the pending bits: whole 64-bit words."""
        return -(-self.vectors // 64) * 8

    @property
    def bar_size(self) -> int:
        """Bytes of the BAR, a power of two."""
        return 1 << (self.pba + self.pba_size - 1).bit_length()


@dataclass(frozen=True)
class Capabilities:
    """Offsets in configuration space of what is looked at again."""

    msix: int
    """0 where there is none."""
    pci_cfg: int
    power: int
    express: int


def build_config(
    *, device_id: int, class_code: int, queues: int, config_size: int, msix: MsixLayout
) -> tuple[ConfigSpace, Capabilities]:
    """Return the configuration space of a virtio function, without its BARs.

    *device_id* is the virtio device ID; *config_size* the bytes of device-specific configuration.
    """
    space = ConfigSpace(
        vendor_id=VENDOR_ID,
        device_id=MODERN_DEVICE_ID_BASE + device_id,
        revision_id=MODERN_REVISION,
        class_code=class_code,
        subsystem_vendor_id=VENDOR_ID,
        subsystem_id=MODERN_DEVICE_ID_BASE + device_id,
        interrupt_pin=1,
    )
    msix_at = _add_msix(space, msix) if msix.vectors else 0
    _add_structures(space, queues, config_size)
    pci_cfg = space.add_capability(
        VirtioPciCfgCap().build(),
        # bar, offset, length and the data window can be written
        b"\0\0\0\0\xff\0\0\0" + b"\xff" * 12,
    )
    # The power state can be written (D0 and D3hot).
    power = space.add_capability(PowerManagementCapability().build(), b"\0\0\0\0\x03\0\0\0")
    express = space.add_capability(ExpressCapability().build(), _express_mask())
    space.seal()
    return space, Capabilities(msix=msix_at, pci_cfg=pci_cfg, power=power, express=express)


def _add_msix(space: ConfigSpace, msix: MsixLayout) -> int:
    control = int(MsixControl.ENABLE | MsixControl.FUNCTION_MASK)
    return space.add_capability(
        MsixCapability(control=msix.vectors - 1, table=MSIX_BAR, pba=msix.pba | MSIX_BAR).build(),
        bytes(2) + control.to_bytes(2, "little"),
    )


def _add_structures(space: ConfigSpace, queues: int, config_size: int) -> None:
    places = [
        (CapType.COMMON_CFG, COMMON_PAGE, CommonConfig.SIZE),
        (CapType.ISR_CFG, ISR_PAGE, 1),
    ]
    if config_size:
        places.append((CapType.DEVICE_CFG, DEVICE_PAGE, config_size))
    for kind, offset, length in places:
        cap = VirtioPciCap(cfg_type=kind, bar=STRUCTURES_BAR, offset=offset, length=length)
        space.add_capability(cap.build())
    notify = VirtioPciNotifyCap(
        bar=STRUCTURES_BAR,
        offset=NOTIFY_PAGE,
        length=queues * NOTIFY_MULTIPLIER,
        notify_off_multiplier=NOTIFY_MULTIPLIER,
    )
    space.add_capability(notify.build())


def _express_mask() -> bytes:
    """Return the writable bits: error reporting, payload and ordering of Device Control,
    ASPM, common clock and read completion boundary of Link Control, completion timeout of
    Device Control 2.  FLR (bit 15 of Device Control) is acted on, not stored.
    """
    mask = ExpressCapability(
        id=0, flags=0, devcap=0, lnkcap=0, lnksta=0, lnkcap2=0, lnkctl2=0x000F,
        devctl=0xFFFF, lnkctl=0x01CB, devctl2=0x001F,
    )  # fmt: skip
    return mask.build()
