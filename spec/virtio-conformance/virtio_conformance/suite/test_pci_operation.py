# SPDX-License-Identifier: Apache-2.0
"""A virtio-pci device at work: interrupts, resets, errors, and registers written wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from virtio_conformance.findings import Finding, about, not_applicable, require
from virtio_conformance.observe import EventFd
from virtio_conformance.rig_vfio_user import VfioUserRig
from virtio_conformance.ring_split import NEXT
from virtio_formats.vfio_user import Command, PciIrq
from virtio_formats.virtio.features import VIRTIO_F_RING_RESET
from virtio_formats.virtio.pci import CapType
from virtio_formats.virtio.status import DeviceStatus as S

MakeRig = Callable[..., VfioUserRig]
QUIET = 0.1


def isr(rig: VfioUserRig) -> int:
    """Read the ISR byte, which clears it."""
    place = rig.pci.find(CapType.ISR_CFG)
    return rig.client.read(place.bar, place.offset, 1)[0]


@pytest.mark.requirement("basic.reset.silent")
def test_silence_after_a_reset(rig: VfioUserRig) -> None:
    """Reset by the driver, the device touches no queue and notifies nobody."""
    rig.bring_up(size=16)
    rig.warm_up()
    rig.pci.reset()
    rig.calls[rig.profile.main].take()
    rig.submit(rig.request(1))
    before = rig.ram.picture()
    rig.main.publish()
    rig.kick(rig.profile.main)
    rig.main_quiet(QUIET)
    rig.ram.expect_untouched(before, rig.main.publish_span)
    require(not rig.calls[rig.profile.main].take(), "a notification after a reset")


@pytest.mark.requirement("pci.common.reset", "basic.features.renegotiate", "vf.reset")
@pytest.mark.parametrize("how", ["status", "message", "flr"])
def test_again_after_a_reset(rig: VfioUserRig, how: str) -> None:
    """After any kind of reset the device can be brought up again, with other rings."""
    rig.bring_up(size=16)
    for turn in range(3):
        rig.run([rig.request(turn)])
        if how == "status":
            rig.pci.reset()
        elif how == "message":
            rig.client.do(Command.DEVICE_RESET)
            told = "the status is not 0 after DEVICE_RESET"
            require(rig.pci.get("device_status") == 0, told, row="vf.reset")
        else:
            express = next((c for c in rig.pci.capabilities if c.id == 0x10), None)
            if express is None:
                not_applicable("the function has no PCI Express capability")
            rig.pci.set_config(express.at + 8, 2, 1 << 15)
            require(rig.pci.get("device_status") == 0, "status after a function level reset")
        rig.rings.clear()
        with about("vf.reset" if how == "message" else "pci.common.reset"):
            rig.bring_up(size=(32, 8, 64)[turn])
            rig.run([rig.request(9)])


@pytest.mark.requirement("pci.msix.map-any", "pci.msix.mapping-works")
def test_last_vector_works(split_rig: VfioUserRig) -> None:
    """The queue's interrupt comes on whatever vector it is mapped to."""
    rig = split_rig
    ring = rig.bring_up(size=16)
    if rig.vector_count < 2:
        not_applicable("the device has a single vector")
    event, last = EventFd(), rig.vector_count - 1
    require(not rig.client.set_irqs(PciIrq.MSIX, last, [event.fd]).failed, "SET_IRQS failed")
    rig.pci.set("queue_select", rig.profile.main)
    rig.pci.set("queue_msix_vector", last)
    rig.calls[rig.profile.main].take()
    rig.run([rig.request(0)])
    require(event.wait(2.0), f"no interrupt on vector {last}")
    require(not rig.calls[rig.profile.main].take(), "an interrupt on the vector before")
    require(ring.outstanding == 0, "the suite lost a buffer")
    event.close()


@pytest.mark.requirement("pci.msix.no-vector-queue", "pci.msix.unmap")
def test_no_vector_for_a_queue(split_rig: VfioUserRig) -> None:
    """With NO_VECTOR no interrupt comes for the queue, on any vector."""
    rig = split_rig
    rig.bring_up(size=16)
    if not rig.vector_count:
        not_applicable("the device has no MSI-X")
    rig.run([rig.request(0)])
    rig.pci.set("queue_select", rig.profile.main)
    rig.pci.set("queue_msix_vector", 0xFFFF)
    events = [rig.config_event, *rig.calls.values()]
    rig.main_quiet(0.02)
    for event in events:
        event.take()
    rig.run([rig.request(1)])
    rig.main_quiet(QUIET)
    require(not any(event.take() for event in events), "an interrupt with NO_VECTOR")


@pytest.mark.requirement(
    "split.used-notify.flag-clear", "pci.isr.queue-bit", "pci.isr.read-clears", "pci.isr.status-bit"
)
def test_interrupts_without_msix(new_rig: MakeRig) -> None:
    """Without MSI-X the line is raised, the ISR says why, and reading it clears it."""
    rig = new_rig(False)
    rig.use_msix = False
    if not rig.client.irq_info(PciIrq.INTX).count:
        not_applicable("the device has no interrupt line")
    line = EventFd()
    require(not rig.client.set_irqs(PciIrq.INTX, 0, [line.fd]).failed, "SET_IRQS of INTx failed")
    rig.bring_up(size=16)
    isr(rig)
    line.take()
    rig.run([rig.request(0)])
    require(line.wait(2.0), "no interrupt on the line")
    status = "pci.isr.status-bit"
    require(rig.pci.config(6, 2) & 8, "the Interrupt Status bit is not set", row=status)
    require(isr(rig) & 1, "the ISR's queue bit is not set", row="pci.isr.queue-bit")
    require(isr(rig) == 0, "reading the ISR does not clear it", row="pci.isr.read-clears")
    require(not rig.pci.config(6, 2) & 8, "the Interrupt Status bit stays set", row=status)
    line.close()


@pytest.mark.requirement(
    "pci.common.queue-reset",
    "pci.common.queue-reset-done",
    "basic.vq-reset.silent",
    "basic.vq-reset.state",
    "basic.vq-reset.reconfigured",
)
def test_queue_reset(rig: VfioUserRig) -> None:
    """One queue is reset and enabled again with another size; it starts from 0."""
    rig.bring_up(VIRTIO_F_RING_RESET, size=16)
    index = rig.profile.main
    rig.run([rig.request(0)])
    for size in (8, 32):
        rig.pci.set("queue_select", index)
        rig.pci.set("queue_reset", 1)
        for _ in range(100):
            if rig.pci.get("queue_reset") == 0:
                break
        told = "queue_reset does not become 0"
        require(rig.pci.get("queue_reset") == 0, told, row="pci.common.queue-reset-done")
        told = "queue_enable is not 0 after a queue reset"
        require(rig.pci.get("queue_enable") == 0, told, row="basic.vq-reset.state")
        before = rig.ram.picture()
        rig.kick(index)
        rig.main_quiet(0.05)
        others = [ring for number, ring in rig.rings.items() if number != index]
        rig.ram.expect_untouched(before, rig.allowed(rings=others), row="basic.vq-reset.silent")
        with about("basic.vq-reset.reconfigured"):
            rig.start_ring(index, rig.make_ring(size))
            rig.run([rig.request(1)])


@pytest.mark.requirement("basic.status.needs-reset", "basic.status.needs-reset-notified")
def test_needs_reset(split_rig: VfioUserRig) -> None:
    """A device that stops serving a queue sets DEVICE_NEEDS_RESET and notifies the driver."""
    rig = split_rig
    rig.bring_up(size=16)
    ring = rig.main_split
    rig.run([rig.request(0)])
    rig.config_event.take()
    where = rig.ram.alloc(64, 64, 1)
    ring.write_desc(0, where, 1, NEXT, 0)
    ring.offer_head(0)
    ring.publish()
    rig.kick(rig.profile.main)
    rig.main_quiet(QUIET)
    if rig.pci.get("device_status") & S.NEEDS_RESET:
        told = "DEVICE_NEEDS_RESET without a configuration interrupt"
        require(rig.config_event.take(), told, row="basic.status.needs-reset-notified")
        return
    ring.lengths.clear()
    try:
        ring.last_used = ring.used_idx
        rig.run([rig.request(1)], limit=0.5)
    except Finding:
        told = "the queue is dead and DEVICE_NEEDS_RESET is not set"
        raise Finding(told, row="basic.status.needs-reset") from None
    not_applicable("a malformed chain is no error state for this device: the queue continues")


REGISTERS = [
    ("queue_select", 0xFFFF), ("queue_size", 0xFFFF), ("queue_size", 3), ("queue_size", 0),
    ("queue_desc", (1 << 64) - 16), ("queue_driver", 1), ("queue_device", 3),
    ("queue_enable", 0xFFFF), ("device_status", 0xFF), ("driver_feature_select", 0xFFFFFFFF),
    ("queue_reset", 1),
]  # fmt: skip


@pytest.mark.requirement("ring.addresses")
@pytest.mark.parametrize(("name", "value"), REGISTERS)
def test_registers_written_wrongly(rig: VfioUserRig, name: str, value: int) -> None:
    """Any value in any register, then a start: no crash, no hang, no stray write."""
    if not rig.profile.has_requests:
        not_applicable("no device profile")
    packed = 1 << 34 if rig.packed else 0
    rig.negotiate((1 << 32 | packed) & rig.offered)
    ring = rig.make_ring(16)
    rig.start_ring(rig.profile.main, ring)
    rig.pci.set("queue_enable", 0)
    rig.pci.reset()
    rig.map_memory = False
    rig.negotiate((1 << 32 | packed) & rig.offered)
    rig.pci.set_queue(rig.profile.main, 16, ring.areas, 0xFFFF, enable=False)
    before = rig.ram.picture()
    rig.pci.set(name, value)
    rig.pci.set("queue_enable", 1)
    rig.driver_ok()
    rig.submit(rig.request(0))
    rig.main.publish()
    try:
        rig.kick(rig.profile.main)
    except Finding:
        pass
    rig.main_quiet(QUIET)
    rig.survive(spinning=True)
    spans = [(a, a + 4096) for a in ring.areas] + [(0x4000_0000, 0x4060_0000)]
    rig.ram.expect_untouched(before, spans)


@pytest.mark.requirement("ring.addresses", "ring.bad-address")
@pytest.mark.parametrize("which", ["queue_desc", "queue_driver", "queue_device"])
@pytest.mark.parametrize("address", [0x3000_0000, (2 << 20) - 8, (1 << 64) - 16], ids=hex)
def test_ring_addresses_outside_memory(rig: VfioUserRig, which: str, address: int) -> None:
    """A ring area outside memory or over its end."""
    if not rig.profile.has_requests:
        not_applicable("no device profile")
    packed = 1 << 34 if rig.packed else 0
    rig.negotiate((1 << 32 | packed) & rig.offered)
    ring = rig.make_ring(16)
    rig.rings[rig.profile.main] = ring
    rig.pci.set_queue(rig.profile.main, 16, ring.areas, 0xFFFF, enable=False)
    rig.places = {rig.profile.main: rig.pci.notify_place(rig.profile.main)}
    rig.pci.set(which, address)
    before = rig.ram.picture()
    rig.pci.set("queue_enable", 1)
    rig.driver_ok()
    rig.submit(rig.request(0))
    ring.publish()
    try:
        rig.kick(rig.profile.main)
    except Finding:
        pass
    rig.main_quiet(QUIET)
    rig.survive(spinning=True)
    spans = [(a, a + 4096) for a in ring.areas] + [(0x4000_0000, 0x4060_0000)]
    if which == "queue_device":  # as much of it as lies in memory
        spans.append((address, address + 8))
    rig.ram.expect_untouched(before, spans)


@pytest.mark.requirement("vf.robust.region-range")
@pytest.mark.parametrize("width", [1, 3, 8, 64])
def test_odd_widths(split_rig: VfioUserRig, width: int) -> None:
    """Accesses of odd widths all over the BARs do no harm."""
    rig = split_rig
    for found in rig.pci.structures:
        if found.bar > 5 or found.type == CapType.PCI_CFG:
            continue
        for offset in range(0, min(found.length, 72), 7):
            try:
                rig.client.read(found.bar, found.offset + offset, width)
                rig.client.write(found.bar, found.offset + offset, b"\xff" * width)
            except Finding as refused:
                require("errno" in str(refused), str(refused))
    rig.survive()


def change_configuration(rig: Any, options: Any) -> None:
    """Make the device change its configuration, by the command that the operator gave."""
    if not options.config_change:
        not_applicable("--config-change says how to make the device change its configuration")
    rig.change_configuration()


@pytest.mark.requirement("pci.common.generation", "pci.isr.config-bit")
def test_configuration_change(split_rig: VfioUserRig, options: Any) -> None:
    """A change shows in config_generation, the ISR and an interrupt."""
    rig = split_rig
    rig.bring_up(size=16)
    size = rig.profile.config_size
    old, generation = rig.pci.read_device(0, size), rig.pci.get("config_generation")
    rig.config_event.take()
    isr(rig)
    change_configuration(rig, options)
    told = "no configuration interrupt"
    require(rig.config_event.wait(2.0), told, row="pci.isr.config-bit")
    reason = isr(rig)
    told = f"ISR {reason:#x} after a configuration change"
    require(reason & 2, told, row="pci.isr.config-bit")
    require(rig.pci.read_device(0, size) != old, "the command changed no configuration")
    require(rig.pci.get("config_generation") != generation, "config_generation stays the same")


@pytest.mark.requirement("pci.msix.no-vector-config")
def test_no_vector_for_configuration(split_rig: VfioUserRig, options: Any) -> None:
    """With NO_VECTOR no interrupt comes for a configuration change."""
    rig = split_rig
    rig.bring_up(size=16)
    if not rig.vector_count:
        not_applicable("the device has no MSI-X")
    rig.pci.set("config_msix_vector", 0xFFFF)
    events = [rig.config_event, *rig.calls.values()]
    for event in events:
        event.take()
    change_configuration(rig, options)
    rig.main_quiet(0.3)
    require(not any(event.take() for event in events), "an interrupt with NO_VECTOR")
