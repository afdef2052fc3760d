# SPDX-License-Identifier: Apache-2.0
"""``vfio_user.capabilities``: what a driver sees of MSI-X, MSI, FLR and power management."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

import pytest

from vfio_user import ConfigSpace, IoEvent, PciDevice, Region, RequestError, UsageError
from vfio_user.capabilities import FunctionLevelReset, Msi, Msix, MsixState, PowerManagement
from vfio_user.testing import LocalClient, events
from virtio_formats.pci import CapId
from virtio_formats.vfio_user import Command, PciIrq, PciRegion

ENABLE, FUNCTION_MASK = 0x8000, 0x4000


class Device(PciDevice):
    def __init__(self) -> None:
        bar = Region(4096, read=lambda offset, count: bytes(count), write=lambda offset, data: None)
        super().__init__(ConfigSpace(vendor_id=1, device_id=2), {PciRegion.BAR0: bar}, {})
        self.msix = Msix(self, 70, bar=PciRegion.BAR1)
        self.msi = Msi(self, 4)
        self.flr = FunctionLevelReset(self)
        self.power = PowerManagement(self)
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def client(device: Device) -> Iterator[LocalClient]:
    client = LocalClient(device)
    client.negotiate()
    yield client
    client.close()


@pytest.fixture
def fd(client: LocalClient) -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    client.assign(PciIrq.MSIX, [fd], start=65)
    client.assign(PciIrq.MSI, [fd], start=1)
    yield fd
    os.close(fd)


def control(client: LocalClient, device: Device, value: int) -> None:
    client.set_config(device.msix.offset + 2, value, 2)


class TestMsix:
    def test_a_driver_finds_it(self, device: Device, client: LocalClient) -> None:
        kinds = [kind for kind, _ in device.config.capabilities()]
        assert kinds == [CapId.MSIX, CapId.MSI, CapId.EXPRESS, CapId.PM]
        assert client.config(device.msix.offset + 2, 2) == 69
        table, pba = (
            client.config(device.msix.offset + 4, 4),
            client.config(device.msix.offset + 8, 4),
        )
        assert (table, pba) == (PciRegion.BAR1, 4096 | PciRegion.BAR1)
        assert client.read(PciRegion.BAR1, 16 * 69, 16) == struct.pack("<QII", 0, 0, 1)
        client.set_config(0x14, 0xFFFFFFFF, 4)
        assert client.config(0x14, 4) == 0xFFFFE000, "a BAR of 8 KiB"

    def test_edges(self, device: Device, client: LocalClient, fd: int) -> None:
        assert not device.msix.trigger(65), "MSI-X is off"
        control(client, device, ENABLE)
        assert device.msix.trigger(65)
        assert events(fd) == 1
        client.write(PciRegion.BAR1, 16 * 65 + 12, struct.pack("<I", 1))
        assert not device.msix.trigger(65)
        assert client.read(PciRegion.BAR1, 4096, 16) == (1 << 65).to_bytes(16, "little")
        client.write(PciRegion.BAR1, 16 * 65 + 12, bytes(4))
        assert events(fd) == 1
        assert client.read(PciRegion.BAR1, 4096, 16) == bytes(16)

    def test_the_function_mask(self, device: Device, client: LocalClient, fd: int) -> None:
        control(client, device, ENABLE | FUNCTION_MASK)
        assert not device.msix.trigger(65)
        control(client, device, ENABLE)
        assert events(fd) == 1

    def test_a_reset_clears_it(self, device: Device, client: LocalClient, fd: int) -> None:
        control(client, device, ENABLE)
        client.write(PciRegion.BAR1, 16 * 65, struct.pack("<QII", 0xFEE00000, 5, 1))
        device.msix.trigger(65)
        client.call(Command.DEVICE_RESET)
        assert client.read(PciRegion.BAR1, 16 * 65, 16) == struct.pack("<QII", 0, 0, 1)
        assert (device.msix.enabled, events(fd)) == (False, 0)

    def test_bad_accesses(self, client: LocalClient) -> None:
        client.write(PciRegion.BAR1, 1, b"x", expect=errno.EINVAL)
        client.write(PciRegion.BAR1, 4096, bytes(8))  # the pending bits are read-only

    def test_it_migrates_with_the_base(self, device: Device, client: LocalClient, fd: int) -> None:
        control(client, device, ENABLE)
        client.write(PciRegion.BAR1, 16 * 65, struct.pack("<QII", 0xFEE00000, 5, 1))
        device.msix.trigger(65)
        other = Device()
        other.restore_base(device.base_state())
        other.msix.restore(MsixState.unpack(device.msix.state().pack()))
        assert (other.base_state(), other.msix.state()) == (
            device.base_state(),
            device.msix.state(),
        )
        there = LocalClient(other)
        there.negotiate()
        there.assign(PciIrq.MSIX, [fd], start=65)
        assert events(fd) == 0
        there.write(PciRegion.BAR1, 16 * 65 + 12, bytes(4))
        assert events(fd) == 1
        there.close()

    @pytest.mark.parametrize("packed", [bytes(16), bytes(16) + b"\2"])
    def test_bytes_that_are_no_state(self, packed: bytes) -> None:
        with pytest.raises(RequestError):
            MsixState.unpack(packed)

    @pytest.mark.parametrize("state", [MsixState(b""), MsixState(bytes(1120), (70,))])
    def test_states_of_another_device(self, device: Device, state: MsixState) -> None:
        with pytest.raises(RequestError):
            device.msix.restore(state)


def test_msi(device: Device, client: LocalClient, fd: int) -> None:
    at = device.msi.offset
    assert client.config(at + 2, 2) == 0x80 | 2 << 1
    assert not device.msi.trigger(1)
    client.set_config(at + 2, 0xFFFF, 2)
    assert client.config(at + 2, 2) & 0xFF == 0x80 | 7 << 4 | 2 << 1 | 1
    assert device.msi.trigger(1)
    client.set_config(at + 2, 1 << 4 | 1, 2)
    device.msi.trigger(3)
    assert events(fd) == 2, "vector 3 shares the last one granted"
    client.set_config(at + 4, 0xFFFFFFFF, 4)
    assert client.config(at + 4, 4) == 0xFFFFFFFC


class TestResets:
    def flr(self, client: LocalClient, device: Device) -> None:
        client.set_config(device.flr.offset + 8, 0x8000, 2)

    def test_function_level_reset(self, device: Device, client: LocalClient) -> None:
        client.set_config(0x04, 7, 2)
        self.flr(client, device)
        assert (device.resets, client.config(0x04, 2)) == (1, 0)
        assert client.config(device.flr.offset + 8, 2) & 0x8000 == 0

    def test_in_the_middle_of_deferred_work(self, device: Device, client: LocalClient) -> None:
        """The running work item finishes; items deferred after it are dropped."""
        seen: list[int] = []

        def work() -> None:
            device.config.write(device.flr.offset + 8, b"\0\x80")
            seen.append(device.resets)

        device.defer(work)
        device.defer(lambda: seen.append(99))
        client.run()
        assert (seen, device.resets) == ([0], 1)

    def test_power_management(self, device: Device, client: LocalClient) -> None:
        at = device.power.offset + 4
        client.set_config(at, 3, 2)
        assert (device.power.power_state, device.resets) == (3, 0)
        client.set_config(at, 0, 2)
        assert (device.power.power_state, device.resets) == (0, 1)


class TestPlaces:
    def test_fixed_offsets(self) -> None:
        config = ConfigSpace(vendor_id=1, device_id=2)
        assert config.add_capability(b"\x09\0\4x", at=0x80) == 0x80
        assert config.add_capability(b"\x09\0\4y") == 0x84
        assert config.add_capability(b"\x09\0\4z", at=0x40) == 0x40
        assert [offset for _, offset in config.capabilities()] == [0x80, 0x84, 0x40]
        assert config.add_extended_capability(0xB, b"1234") == 0x100
        assert config.add_extended_capability(0xB, b"1234", at=0x200) == 0x200
        for at in (0x80, 0x7E, 0x20, 0x81, 0xFE):
            with pytest.raises(UsageError):
                config.add_capability(b"\x09\0\4x", at=at)
        with pytest.raises(UsageError):
            config.add_extended_capability(0xB, b"1234", at=0x104)

    def test_the_first_extended_one(self) -> None:
        with pytest.raises(UsageError):
            ConfigSpace(vendor_id=1, device_id=2).add_extended_capability(0xB, b"", at=0x200)

    def test_what_is_there_already(self, device: Device) -> None:
        with pytest.raises(UsageError):
            Msix(device, 1, bar=PciRegion.BAR2)
        with pytest.raises(UsageError):
            device.add_region(PciRegion.BAR0, Region(4096, read=lambda o, c: bytes(c)))
        with pytest.raises(UsageError):
            Msi(Device(), 3)


def test_ioeventfds_that_come_and_go(device: Device) -> None:
    watched: list[tuple[int, bool]] = []
    device.on_io_event(lambda event, added: watched.append((event.fd, added)))
    kick = os.eventfd(0)
    event = IoEvent(kick, 8, 4, lambda: None)
    device.add_io_event(PciRegion.BAR0, event)
    assert device.regions[0].io_events == [event]
    device.remove_io_event(PciRegion.BAR0, event)
    assert (device.regions[0].io_events, watched) == ([], [(kick, True), (kick, False)])
    with pytest.raises(UsageError):
        device.add_io_event(PciRegion.BAR0, IoEvent(kick, 4096, 4, lambda: None))
    os.close(kick)
