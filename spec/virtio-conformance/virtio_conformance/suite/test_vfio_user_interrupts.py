# SPDX-License-Identifier: Apache-2.0
"""Masked interrupts over vfio-user: by SET_IRQS, by themselves, and by MSI-X registers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from virtio_conformance.findings import not_applicable, require
from virtio_conformance.observe import EventFd
from virtio_conformance.rig_vfio_user import VfioUserRig
from virtio_formats.pci import CapId
from virtio_formats.vfio_user import Command, IrqInfoFlags, IrqSet, IrqSetFlags, PciIrq
from virtio_formats.virtio.pci import CapType

MakeRig = Callable[..., VfioUserRig]
QUIET = 0.1
FUNCTION_MASK = 1 << 14


def act(rig: VfioUserRig, index: int, action: int, start: int = 0) -> None:
    """Mask or unmask one interrupt.  Raise a finding if that is refused."""
    flags = IrqSetFlags.DATA_NONE | action
    message = IrqSet(argsz=20, flags=flags, index=index, start=start, count=1).build()
    rig.client.do(Command.DEVICE_SET_IRQS, message)


def line_up(new_rig: MakeRig) -> tuple[VfioUserRig, EventFd]:
    """Return a running device with its interrupt line on an eventfd."""
    rig = new_rig(False)
    rig.use_msix = False
    if not rig.client.irq_info(PciIrq.INTX).count:
        not_applicable("the device has no interrupt line")
    line = EventFd()
    require(not rig.client.set_irqs(PciIrq.INTX, 0, [line.fd]).failed, "SET_IRQS of INTx failed")
    rig.bring_up(size=16)
    return rig, line


def read_isr(rig: VfioUserRig) -> int:
    """Read the ISR byte, which lowers the line."""
    place = rig.pci.find(CapType.ISR_CFG)
    return rig.client.read(place.bar, place.offset, 1)[0]


@pytest.mark.requirement("vf.irq.mask")
def test_masked_line(new_rig: MakeRig) -> None:
    """A masked line is not signalled; unmasked, what is pending comes."""
    rig, line = line_up(new_rig)
    if not rig.client.irq_info(PciIrq.INTX).flags & IrqInfoFlags.MASKABLE:
        not_applicable("the interrupt line is not maskable")
    read_isr(rig)
    act(rig, PciIrq.INTX, IrqSetFlags.ACTION_MASK)
    line.take()
    rig.run([rig.request(0)])
    require(not line.wait(QUIET), "a masked interrupt was signalled")
    act(rig, PciIrq.INTX, IrqSetFlags.ACTION_UNMASK)
    require(line.wait(2.0), "what was pending did not come with the unmasking")
    line.close()


@pytest.mark.requirement("vf.irq.auto-mask")
def test_line_that_masks_itself(new_rig: MakeRig) -> None:
    """Triggered, the line is silent until it is unmasked."""
    rig, line = line_up(new_rig)
    if not rig.client.irq_info(PciIrq.INTX).flags & IrqInfoFlags.AUTOMASKED:
        not_applicable("the interrupt line does not mask itself")
    rig.run([rig.request(0)])
    require(line.wait(2.0), "no interrupt on the line")
    read_isr(rig)
    rig.run([rig.request(1)])
    require(not line.wait(QUIET), "an interrupt before the line was unmasked")
    act(rig, PciIrq.INTX, IrqSetFlags.ACTION_UNMASK)
    require(line.wait(2.0), "the interrupt after the unmasking is lost")
    line.close()


@pytest.mark.requirement("vf.irq.mask")
def test_masked_vector(split_rig: VfioUserRig) -> None:
    """A masked MSI-X vector is not signalled; unmasked, what is pending comes."""
    rig = split_rig
    rig.bring_up(size=16)
    if not rig.vector_count:
        not_applicable("the device has no MSI-X")
    if not rig.client.irq_info(PciIrq.MSIX).flags & IrqInfoFlags.MASKABLE:
        not_applicable("MSI-X vectors are not maskable by SET_IRQS")
    vector = rig.vectors[rig.profile.main]
    event = rig.calls[rig.profile.main] if vector else rig.config_event
    act(rig, PciIrq.MSIX, IrqSetFlags.ACTION_MASK, vector)
    event.take()
    rig.run([rig.request(0)])
    require(not event.wait(QUIET), "a masked vector was signalled")
    act(rig, PciIrq.MSIX, IrqSetFlags.ACTION_UNMASK, vector)
    require(event.wait(2.0), "what was pending did not come with the unmasking")


def msix_registers(rig: VfioUserRig) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Return the offset of the MSI-X capability, and BAR and offset of table and PBA."""
    found = [cap for cap in rig.pci.capabilities if cap.id == CapId.MSIX]
    if not found:
        not_applicable("the device has no MSI-X")
    words = [int.from_bytes(found[0].raw[at : at + 4], "little") for at in (4, 8)]
    table, pending = ((word & 7, word & ~7) for word in words)
    return found[0].at, table, pending


@pytest.mark.requirement("vf.irq.msix-mask")
@pytest.mark.parametrize("how", ["function", "vector"])
def test_msix_mask_bits(split_rig: VfioUserRig, how: str) -> None:
    """Masked by register, a vector is pending and not signalled; unmasked, it comes."""
    rig = split_rig
    rig.bring_up(size=16)
    at, table, pending = msix_registers(rig)
    vector = rig.vectors[rig.profile.main]
    event = rig.calls[rig.profile.main] if vector else rig.config_event
    control = rig.pci.config(at + 2, 2)
    entry = table[1] + 16 * vector + 12

    def mask(on: bool) -> None:
        if how == "function":
            rig.pci.set_config(at + 2, 2, control | (FUNCTION_MASK if on else 0))
        else:
            rig.client.write(table[0], entry, (1 if on else 0).to_bytes(4, "little"))

    mask(False)
    mask(True)
    event.take()
    rig.run([rig.request(0)])
    require(not event.wait(QUIET), "a masked vector was signalled")
    bits = rig.client.read(pending[0], pending[1] + vector // 64 * 8, 8)
    raised = int.from_bytes(bits, "little") >> vector % 64 & 1
    require(raised, "the pending bit of a masked vector is not set")
    mask(False)
    require(event.wait(2.0), "what was pending did not come with the unmasking")
