# SPDX-License-Identifier: Apache-2.0
"""The PCI function and its virtio structures, as a driver finds them."""

from __future__ import annotations

import struct

import pytest

from virtio_conformance.findings import about, not_applicable, require
from virtio_conformance.rig_vfio_user import VfioUserRig
from virtio_conformance.virtio_pci import VirtioPci
from virtio_formats.pci import CapId
from virtio_formats.vfio_user import PciIrq
from virtio_formats.virtio.features import (
    VIRTIO_F_NOTIFICATION_DATA,
    VIRTIO_F_RING_RESET,
    VIRTIO_F_SR_IOV,
    has,
)
from virtio_formats.virtio.pci import CapType

VIRTIO_F_ADMIN_VQ = 41


@pytest.fixture
def pci(split_rig: VfioUserRig) -> VirtioPci:
    """Return the function before any negotiation."""
    return split_rig.pci


@pytest.fixture
def offered(split_rig: VfioUserRig) -> int:
    """Return the offered features."""
    return split_rig.offered


@pytest.mark.requirement("pci.bus.valid-function")
def test_configuration_header(pci: VirtioPci) -> None:
    """A type 0 header, a capability list that ends, reads that are the same twice."""
    require(pci.config(0x0E, 1) & 0x7F == 0, f"header type {pci.config(0x0E, 1):#x}")
    require(pci.config(0x06, 2) & 0x10, "no capability list")
    require(pci.capabilities, "an empty capability list")
    again = [(cap.at, cap.raw) for cap in VirtioPci(pci.client).capabilities]
    require(again == [(cap.at, cap.raw) for cap in pci.capabilities], "two reads differ")


@pytest.mark.requirement("pci.bus.valid-function")
def test_bars_size(pci: VirtioPci) -> None:
    """Memory BARs have sizes that are powers of two and hold what the region info says."""
    bar = 0
    while bar < 6:
        at = 0x10 + 4 * bar
        before = pci.config(at, 4)
        wide = before & 7 == 4
        size = pci.client.region_info(bar)[0].size
        pci.set_config(at, 4, 0xFFFFFFFF)
        mask = pci.config(at, 4)
        pci.set_config(at, 4, before)
        if size and mask:
            low = (
                (~(mask & ~0xF) & 0xFFFFFFFF) + 1 if mask & 1 == 0 else (~(mask & ~3) & 0xFFFF) + 1
            )
            require(low == size or size > 1 << 31, f"BAR {bar} sizes to {low:#x}, region {size:#x}")
            require(size & (size - 1) == 0, f"BAR {bar} has {size:#x} bytes")
        bar += 2 if wide else 1


@pytest.mark.requirement("pci.id.vendor", "pci.id.device", "pci.id.range")
def test_vendor_and_device(pci: VirtioPci, split_rig: VfioUserRig) -> None:
    """Vendor 0x1AF4, device 0x1040 plus the virtio ID (or the transitional one)."""
    device = pci.config(2, 2)
    vendor = pci.config(0, 2)
    require(vendor == 0x1AF4, f"vendor ID {vendor:#x}", row="pci.id.vendor")
    require(0x1000 <= device <= 0x107F, f"device ID {device:#x}", row="pci.id.range")
    expected = split_rig.profile.device_id
    if expected and device >= 0x1040:
        told = f"device ID {device:#x} for virtio ID {expected}"
        require(device == 0x1040 + expected, told, row="pci.id.device")


@pytest.mark.requirement("pci.id.revision", "pci.id.subsystem-device")
def test_modern_revision(pci: VirtioPci) -> None:
    """A non-transitional device has a revision of 1 and a subsystem device ID of 0x40 or more."""
    if pci.config(2, 2) < 0x1040:
        not_applicable("a transitional device")
    subsystem = pci.config(0x2E, 2)
    require(pci.config(8, 1) >= 1, f"revision {pci.config(8, 1)}", row="pci.id.revision")
    told = f"subsystem device ID {subsystem:#x}"
    require(subsystem >= 0x40, told, row="pci.id.subsystem-device")


@pytest.mark.requirement(
    "pci.common.present", "pci.notify.present", "pci.isr.present", "pci.cfg-access.present"
)
def test_structures_are_there(pci: VirtioPci) -> None:
    """Common, notification and ISR structures, and the configuration access capability."""
    rows = {
        CapType.COMMON_CFG: "common",
        CapType.NOTIFY_CFG: "notify",
        CapType.ISR_CFG: "isr",
        CapType.PCI_CFG: "cfg-access",
    }
    for kind, name in rows.items():
        with about(f"pci.{name}.present"):
            pci.find(kind)


@pytest.mark.requirement("pci.cap.length", "pci.common.aligned", "pci.device-config.aligned")
def test_structures_lie_well(pci: VirtioPci) -> None:
    """Capabilities are long enough, structures aligned and within their BARs."""
    due = {CapType.NOTIFY_CFG: 20, CapType.PCI_CFG: 20, CapType.SHARED_MEMORY_CFG: 24}
    for found in pci.structures:
        least = due.get(CapType(found.type), 16) if found.type in list(CapType) else 16
        require(len(found.cap.raw) >= least, f"cap_len {len(found.cap.raw)} of type {found.type}")
        if found.type in (CapType.COMMON_CFG, CapType.DEVICE_CFG):
            common = found.type == CapType.COMMON_CFG
            row = f"pci.{'common' if common else 'device-config'}.aligned"
            told = f"type {found.type} at offset {found.offset:#x}"
            require(found.offset % 4 == 0, told, row=row)
        if found.type in (CapType.PCI_CFG, CapType.VENDOR_CFG):
            continue
        require(found.bar < 6, f"type {found.type} in BAR {found.bar}")
        size = pci.client.region_info(found.bar)[0].size
        end = found.offset + found.length
        require(end <= size, f"type {found.type} ends at {end:#x} of BAR {found.bar} ({size:#x})")
    require(pci.find(CapType.COMMON_CFG).length >= 56, "the common structure is too short")


@pytest.mark.requirement(
    "pci.notify.aligned",
    "pci.notify.multiplier",
    "pci.notify.length",
    "pci.notify.covers",
    "pci.notify.formula",
)
def test_notification_structure(pci: VirtioPci, offered: int) -> None:
    """Alignment, multiplier and length fit every queue."""
    notify = pci.find(CapType.NOTIFY_CFG)
    require(notify.offset % 2 == 0, f"offset {notify.offset:#x}", row="pci.notify.aligned")
    factor = notify.multiplier
    even_power = factor & (factor - 1) == 0 and factor != 1
    require(even_power, f"multiplier {factor}", row="pci.notify.multiplier")
    require(notify.length >= 2, f"length {notify.length}", row="pci.notify.length")
    for index in range(pci.get("num_queues")):
        pci.set("queue_select", index)
        end = pci.get("queue_notify_off") * factor + 2
        told = f"queue {index} is notified at {end - 2:#x}"
        require(notify.length >= end, told, row="pci.notify.formula")


@pytest.mark.requirement(
    "pci.notify.data-multiplier",
    "pci.notify.data-aligned",
    "pci.notify.data-length",
    "pci.notify.data-covers",
    "pci.notify.data-formula",
)
def test_notification_structure_with_data(pci: VirtioPci, offered: int) -> None:
    """The same with NOTIFICATION_DATA, whose writes have 4 bytes."""
    if not has(offered, VIRTIO_F_NOTIFICATION_DATA):
        not_applicable("NOTIFICATION_DATA is not offered")
    notify = pci.find(CapType.NOTIFY_CFG)
    factor = notify.multiplier
    told = f"offset {notify.offset:#x}"
    require(notify.offset % 4 == 0, told, row="pci.notify.data-aligned")
    told = f"length {notify.length}"
    require(notify.length >= 4, told, row="pci.notify.data-length")
    good = factor == 0 or (factor % 4 == 0 and factor & (factor - 1) == 0)
    require(good, f"multiplier {factor}", row="pci.notify.data-multiplier")
    for index in range(pci.get("num_queues")):
        pci.set("queue_select", index)
        end = pci.get("queue_notify_off") * factor + 4
        told = f"queue {index} is notified at {end - 4:#x}"
        require(notify.length >= end, told, row="pci.notify.data-formula")


@pytest.mark.requirement("pci.shm.inside-bar", "pci.shm.unique-id")
def test_shared_memory_regions(pci: VirtioPci) -> None:
    """Shared memory regions lie within their BARs and have ids of their own."""
    regions = [s for s in pci.structures if s.type == CapType.SHARED_MEMORY_CFG]
    if not regions:
        not_applicable("the device has no shared memory")
    ids = [region.id for region in regions]
    require(len(set(ids)) == len(ids), f"ids {ids}", row="pci.shm.unique-id")
    for region in regions:
        high_offset, high_length = struct.unpack_from("<II", region.cap.raw, 16)
        end = region.offset + region.length + (high_offset + high_length << 32)
        size = pci.client.region_info(region.bar)[0].size
        require(end <= size, f"region {region.id} ends at {end:#x} of {size:#x}")


@pytest.mark.requirement("pci.vendor.not-virtio", "pci.vendor.size")
def test_vendor_data(pci: VirtioPci) -> None:
    """Vendor data has a vendor of its own and a size that is a multiple of 4."""
    found = [s for s in pci.structures if s.type == CapType.VENDOR_CFG]
    if not found:
        not_applicable("the device has no vendor data")
    for one in found:
        vendor = int.from_bytes(one.cap.raw[4:6], "little")
        require(vendor != 0x1AF4, "vendor data of the vendor 0x1AF4")
        told = f"{len(one.cap.raw)} bytes of vendor data"
        require(len(one.cap.raw) % 4 == 0, told, row="pci.vendor.size")


@pytest.mark.requirement("pci.cfg-access.read", "pci.cfg-access.write")
def test_access_through_configuration_space(pci: VirtioPci) -> None:
    """The window in configuration space reads and writes the BAR it is pointed at."""
    common = pci.find(CapType.COMMON_CFG)
    window = pci.find(CapType.PCI_CFG).cap.at

    def point(offset: int, length: int) -> None:
        pci.set_config(window + 4, 1, common.bar)
        pci.set_config(window + 8, 4, common.offset + offset)
        pci.set_config(window + 12, 4, length)

    point(18, 2)
    require(pci.config(window + 16, 2) == pci.get("num_queues"), "num_queues through the window")
    for select in (1, 0):
        point(0, 4)
        pci.set_config(window + 16, 4, select)
        told = "a write through the window is lost"
        require(pci.get("device_feature_select") == select, told, row="pci.cfg-access.write")
    for offset, length in ((0xFFFFFFFC, 4), (0, 3), (1 << 20, 4), (0, 64)):
        point(offset, length)
        pci.config(window + 16, 4)
    require(pci.client.usable(), "accesses through a window on nothing end the connection")


@pytest.mark.requirement("pci.common.device-feature", "basic.features.version-1")
def test_device_feature_windows(pci: VirtioPci) -> None:
    """device_feature shows 32 bits for each select, 0 beyond the last."""
    words = []
    for select in (0, 1, 2, 3, 0x7FFFFFFF, 0xFFFFFFFF, 1, 0):
        pci.set("device_feature_select", select)
        require(pci.get("device_feature_select") == select, "the select does not read back")
        words.append(pci.get("device_feature"))
    require(words[0] == words[7] and words[1] == words[6], "the same select shows two values")
    require(words[1] & 1, "VERSION_1 is not offered", row="basic.features.version-1")
    require(not any(words[4:6]), f"features beyond bit 127: {words[4:6]}")


@pytest.mark.requirement("pci.common.driver-feature")
def test_driver_feature_reads_back(pci: VirtioPci) -> None:
    """driver_feature reads back what was written, for each select."""
    features = pci.device_features()
    pci.reset()
    pci.set("device_status", 1)
    pci.set("device_status", 3)
    pci.set_features(features)
    for select in (1, 0):
        pci.set("driver_feature_select", select)
        got = pci.get("driver_feature")
        due = features >> 32 * select & 0xFFFFFFFF
        require(got & due == due, f"driver_feature {got:#x}, written was {due:#x}")


@pytest.mark.requirement(
    "pci.common.reset",
    "pci.common.queue-enable-reset",
    "basic.reset.status-zero",
    "pci.msix.reset",
)
def test_reset_values(split_rig: VfioUserRig) -> None:
    """After a reset: status 0, no queue enabled, no event mapped."""
    rig, pci = split_rig, split_rig.pci
    for index in range(min(2, pci.get("num_queues"))):
        if not index:
            rig.negotiate((1 << 32) & rig.offered)
        rig.start_ring(index, rig.make_ring(16))
    pci.reset()
    require(pci.get("device_status") == 0, f"status {pci.get('device_status')}")
    told = "the configuration vector survives a reset"
    require(pci.get("config_msix_vector") == 0xFFFF, told, row="pci.msix.reset")
    for index in range(pci.get("num_queues")):
        pci.set("queue_select", index)
        told = f"queue {index} is enabled after a reset"
        require(pci.get("queue_enable") == 0, told, row="pci.common.queue-enable-reset")
        told = f"queue {index} keeps its vector"
        require(pci.get("queue_msix_vector") == 0xFFFF, told, row="pci.msix.reset")


@pytest.mark.requirement("pci.common.queue-size-unavailable", "pci.common.queue-size-power")
def test_queue_sizes(pci: VirtioPci) -> None:
    """Queues have sizes that are powers of two; those that do not exist have 0."""
    count = pci.get("num_queues")
    for index in range(count):
        pci.set("queue_select", index)
        size = pci.get("queue_size")
        told = f"queue {index} has {size} descriptors"
        require(size & (size - 1) == 0, told, row="pci.common.queue-size-power")
    for index in (count, count + 1, 0x7FFF, 0xFFFF):
        pci.set("queue_select", index)
        told = f"queue {index} of {count} has a size"
        require(pci.get("queue_size") == 0, told, row="pci.common.queue-size-unavailable")


@pytest.mark.requirement("pci.common.admin-index", "pci.common.admin-num")
def test_administration_queues(pci: VirtioPci, offered: int) -> None:
    """Administration queues follow all others, and their numbers fit 16 bits."""
    if not has(offered, VIRTIO_F_ADMIN_VQ):
        not_applicable("ADMIN_VQ is not offered")
    require(pci.accept(1 << 32 | 1 << VIRTIO_F_ADMIN_VQ), "ADMIN_VQ is refused")
    index, number = pci.get("admin_queue_index"), pci.get("admin_queue_num")
    require(index >= pci.get("num_queues"), f"admin_queue_index {index}")
    told = f"{number} administration queues from {index} on"
    require(number <= 0x10000 - index, told, row="pci.common.admin-num")


@pytest.mark.requirement("pci.config.halves")
def test_halves_of_configuration_fields(pci: VirtioPci, split_rig: VfioUserRig) -> None:
    """Eight bytes of configuration read the same in one piece, in halves and in bytes."""
    size = split_rig.profile.config_size
    if size < 8:
        not_applicable("the device has no configuration of 8 bytes that the suite knows")
    whole = pci.read_device(0, size)
    for width in (4, 2, 1):
        parts = b"".join(pci.read_device(at, width) for at in range(0, size, width))
        require(parts == whole, f"accesses of {width} bytes read {parts.hex()}")


@pytest.mark.requirement("pci.msix.count", "pci.msix.table-size", "vf.irq.info")
def test_msix_table_size(pci: VirtioPci) -> None:
    """MSI-X has 2 to 0x800 vectors, as many as the interrupt info says."""
    msix = [cap for cap in pci.capabilities if cap.id == CapId.MSIX]
    if not msix:
        not_applicable("the device has no MSI-X")
    size = (int.from_bytes(msix[0].raw[2:4], "little") & 0x7FF) + 1
    require(2 <= size <= 0x800, f"{size} vectors", row="pci.msix.table-size")
    count = pci.client.irq_info(PciIrq.MSIX).count
    told = f"table size {size}, interrupt info says {count}"
    require(count == size, told, row="vf.irq.info")


@pytest.mark.requirement(
    "pci.msix.map-any",
    "pci.msix.unmap",
    "pci.msix.read-back",
    "pci.msix.mapping-works",
    "pci.msix.mapping-failure",
)
def test_vector_registers(pci: VirtioPci) -> None:
    """Every vector can be mapped to every event, unmapped, and is read back; others fail."""
    count = pci.client.irq_info(PciIrq.MSIX).count
    if not count:
        not_applicable("the device has no MSI-X")
    pci.reset()
    pci.set("device_status", 3)
    for name in ("config_msix_vector", "queue_msix_vector"):
        pci.set("queue_select", 0)
        for vector in {0, 1, count // 2, count - 1}:
            pci.set(name, vector)
            got = pci.get(name)
            require(got == vector, f"{name} {vector} reads {got:#x}", row="pci.msix.read-back")
        for vector in {count, 0x7FF, 0x800, 0xFFFE}:
            pci.set(name, vector)
            got = pci.get(name)
            due = vector if vector < count else 0xFFFF
            told = f"{name} {vector:#x} of {count} reads {got:#x}"
            require(got == due, told, row="pci.msix.mapping-failure")
        pci.set(name, 0xFFFF)
        require(pci.get(name) == 0xFFFF, f"{name} cannot be unmapped", row="pci.msix.unmap")


@pytest.mark.requirement("basic.features.sr-iov", "basic.features.no-sr-iov")
def test_sr_iov(pci: VirtioPci, offered: int) -> None:
    """SR_IOV is offered exactly by a function with that extended capability."""
    size = pci.client.region_info(7)[0].size
    at, present = 0x100, False
    seen: set[int] = set()
    while size > 256 and at and at not in seen:
        seen.add(at)
        header = pci.config(at, 4)
        present |= header & 0xFFFF == 0x10
        at = header >> 20
    require(present == has(offered, VIRTIO_F_SR_IOV), f"capability {present}")


@pytest.mark.requirement("pci.common.queue-reset-zero", "pci.common.queue-reset-enabled")
def test_queue_reset_register_at_rest(split_rig: VfioUserRig) -> None:
    """With RING_RESET queue_reset reads 0 after a reset and once the queue is enabled."""
    rig = split_rig
    rig.need(VIRTIO_F_RING_RESET, "RING_RESET")
    rig.negotiate(1 << 32 | 1 << VIRTIO_F_RING_RESET)
    rig.pci.set("queue_select", 0)
    require(rig.pci.get("queue_reset") == 0, "queue_reset after a reset")
    rig.start_ring(0, rig.make_ring(16))
    told = "queue_reset of an enabled queue"
    require(rig.pci.get("queue_reset") == 0, told, row="pci.common.queue-reset-enabled")
