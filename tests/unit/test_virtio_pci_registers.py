# SPDX-License-Identifier: Apache-2.0
"""``vballoon.virtio_pci``: configuration space, registers, interrupts, as a driver finds them.

Virtio 1.4, *Virtio Over PCI Bus*; the classes are named as its sections.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator

import pytest
from tests.fakes.descriptors import open_fds
from tests.fakes.echo import Echo
from tests.fakes.vfio_client import events
from tests.fakes.virtio_pci import Guest

from vballoon.virtio_pci import DEFAULT_RING_FEATURES, VirtioPciFunction
from virtio_formats.pci import CapId, Command
from virtio_formats.vfio_user import Command as Message
from virtio_formats.vfio_user import PciIrq, PciRegion
from virtio_formats.virtio import features as f
from virtio_formats.virtio.pci import NO_VECTOR, CapType, CommonConfig
from virtio_formats.virtio.status import DeviceStatus as S

V1 = f.mask(f.VIRTIO_F_VERSION_1)


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def guest(echo: Echo) -> Iterator[Guest]:
    before = open_fds()
    function = VirtioPciFunction(echo)
    guest = Guest(function)
    yield guest
    guest.close()
    function.close()
    assert open_fds() == before, "descriptors leaked"


class TestPciDeviceDiscovery:
    def test_ids(self, guest: Guest) -> None:
        assert guest.client.config(0x00, 2) == 0x1AF4
        assert guest.client.config(0x02, 2) == 0x1040 + 42
        assert guest.client.config(0x08, 1) == 1
        assert guest.client.config(0x09, 3) == 0x078000
        assert guest.client.config(0x2C, 2) == 0x1AF4

    def test_bars(self, guest: Guest) -> None:
        """A 64-bit BAR of 16 KiB, and one for MSI-X."""
        for bar, answer in enumerate([0xFFFFC004, 0xFFFFFFFF, 0xFFFFE000, 0, 0, 0]):
            guest.client.set_config(0x10 + 4 * bar, 0xFFFFFFFF, 4)
            assert guest.client.config(0x10 + 4 * bar, 4) == answer

    def test_what_can_be_written_of_pci_express_and_power_management(self, guest: Guest) -> None:
        """The bits that software owns, no capability bits, no status."""
        express = guest.express
        before = guest.client.read(PciRegion.CONFIG, express, 60)
        for offset in [o for o in range(express + 2, express + 60, 2) if o != express + 8]:
            guest.client.set_config(offset, 0xFFFF, 2)
        guest.client.set_config(express + 8, 0x7FFF, 2)
        after = guest.client.read(PciRegion.CONFIG, express, 60)
        changed = {i: a for i, (a, b) in enumerate(zip(after, before, strict=True)) if a != b}
        assert changed == {8: 0xFF, 9: 0x7F, 16: 0xCB, 17: 0x01, 40: 0x1F, 48: 0x0F}
        power = dict(guest.function.config.capabilities())[CapId.PM]
        guest.client.set_config(power + 2, 0xFFFFFFFF, 4)
        guest.client.set_config(power + 4, 0xFFFFFFFF, 4)
        assert guest.client.read(PciRegion.CONFIG, power + 2, 6) == b"\3\0\3\0\0\0"

    def test_standard_capabilities(self, guest: Guest) -> None:
        ids = [cap for cap, _ in guest.function.config.capabilities()]
        assert ids.count(CapId.VENDOR) == 5
        assert {CapId.MSIX, CapId.PM, CapId.EXPRESS} < set(ids)
        assert guest.client.config(0x06, 2) & 0x10
        assert guest.client.config(guest.express + 2, 2) == 0x0002, "version 2, Endpoint"


class TestVirtioStructurePciCapabilities:
    def test_every_structure_lies_in_its_bar(self, guest: Guest) -> None:
        assert set(guest.caps) == {
            CapType.COMMON_CFG,
            CapType.NOTIFY_CFG,
            CapType.ISR_CFG,
            CapType.DEVICE_CFG,
            CapType.PCI_CFG,
        }
        taken = []
        for kind, cap in guest.caps.items():
            if kind == CapType.PCI_CFG:
                continue
            size = guest.function.regions[cap.bar].size
            assert cap.offset % 4 == 0
            assert cap.length > 0
            assert cap.offset + cap.length <= size
            taken.append((cap.offset, cap.offset + cap.length))
        taken.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(taken))
        assert guest.caps[CapType.COMMON_CFG].length == CommonConfig.SIZE
        assert guest.caps[CapType.DEVICE_CFG].length == 6

    def test_a_device_without_configuration_has_no_such_capability(self) -> None:
        echo = Echo()
        echo.config.clear()
        function = VirtioPciFunction(echo)
        guest = Guest(function)
        assert CapType.DEVICE_CFG not in guest.caps
        guest.close()
        function.close()

    def test_notify_covers_every_queue(self, guest: Guest) -> None:
        assert guest.multiplier == 4
        length = guest.caps[CapType.NOTIFY_CFG].length
        for index in range(guest.get("num_queues")):
            guest.set("queue_select", index)
            assert length >= guest.get("queue_notify_off") * guest.multiplier + 4

    def test_capabilities_cannot_be_written(self, guest: Guest) -> None:
        before = guest.client.read(PciRegion.CONFIG, 0x40, 0x94 - 0x40)
        for offset in range(0x4C, 0x80, 4):
            guest.client.set_config(offset, 0xFFFFFFFF, 4)
        assert guest.client.read(PciRegion.CONFIG, 0x40, 0x94 - 0x40) == before


class TestCommonConfigurationStructureLayout:
    def test_features_word_by_word(self, guest: Guest) -> None:
        assert guest.offered() == Echo.FEATURE | DEFAULT_RING_FEATURES
        guest.set("device_feature_select", 2)
        assert guest.get("device_feature") == 0
        guest.set("device_feature_select", 0xFFFFFFFF)
        assert guest.get("device_feature") == 0

    def test_driver_features_are_mirrored(self, guest: Guest) -> None:
        guest.set("driver_feature_select", 1)
        guest.set("driver_feature", 1)
        assert guest.get("driver_feature") == 1
        guest.set("driver_feature_select", 0)
        assert guest.get("driver_feature") == 0
        guest.set("driver_feature_select", 2)
        guest.set("driver_feature", 0xFFFFFFFF)
        assert guest.get("driver_feature") == 0

    def test_read_only_fields(self, guest: Guest) -> None:
        for name in ("device_feature", "num_queues", "config_generation", "queue_notify_off"):
            before = guest.get(name)
            guest.set(name, 0x5A)
            assert guest.get(name) == before
        assert guest.get("num_queues") == 2

    def test_a_queue_that_is_not_there(self, guest: Guest) -> None:
        guest.set("queue_select", 2)
        assert guest.get("queue_select") == 2
        for name in ("queue_size", "queue_enable", "queue_desc", "queue_notify_off"):
            assert guest.get(name) == 0
        for name in ("queue_size", "queue_enable", "queue_msix_vector", "queue_desc"):
            guest.set(name, 1)
        assert guest.get("queue_msix_vector") == NO_VECTOR
        assert guest.get("queue_enable") == 0

    def test_queue_size(self, guest: Guest) -> None:
        assert guest.get("queue_size") == 64
        for bad in (0, 3, 65, 128, 0xFFFF):
            guest.set("queue_size", bad)
            assert guest.get("queue_size") == 64
        guest.set("queue_size", 2)
        assert guest.get("queue_size") == 2

    def test_addresses_in_halves_and_whole(self, guest: Guest) -> None:
        guest.set("queue_desc", 0x1122334455667788)
        assert guest.get("queue_desc") == 0x1122334455667788
        cap = guest.caps[CapType.COMMON_CFG]
        guest.client.write(cap.bar, cap.offset + 40, bytes(range(8)))
        assert guest.get("queue_driver") == 0x0706050403020100
        assert guest.client.read(cap.bar, cap.offset + 44, 4) == bytes([4, 5, 6, 7])

    def test_an_enabled_queue_keeps_its_addresses(self, guest: Guest) -> None:
        guest.set("queue_desc", 0x1000)
        guest.set("queue_enable", 1)
        guest.set("queue_desc", 0x2000)
        guest.set("queue_size", 2)
        guest.set("queue_enable", 0)
        assert guest.get("queue_desc") == 0x1000
        assert guest.get("queue_size") == 64
        assert guest.get("queue_enable") == 1

    @pytest.mark.parametrize(
        ("offset", "count"),
        [(0, 8), (2, 4), (1, 2), (0, 1), (16, 4), (20, 2), (36, 8), (34, 4), (62, 4), (64, 4)],
    )
    def test_accesses_across_fields(self, guest: Guest, offset: int, count: int) -> None:
        cap = guest.caps[CapType.COMMON_CFG]
        guest.client.read(cap.bar, cap.offset + offset, count, expect=errno.EINVAL)
        guest.client.write(cap.bar, cap.offset + offset, bytes(count), expect=errno.EINVAL)


class TestDeviceStatus:
    def test_initialisation(self, guest: Guest) -> None:
        assert guest.negotiate(V1 | Echo.FEATURE) == S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK
        assert guest.function.features == V1 | Echo.FEATURE

    @pytest.mark.parametrize("features", [0, Echo.FEATURE, V1 | 1 << 6, V1 | 1 << 63])
    def test_features_that_are_not_accepted(self, guest: Guest, features: int) -> None:
        assert guest.negotiate(features) == S.ACKNOWLEDGE | S.DRIVER
        assert guest.function.features == 0
        guest.set("device_status", S.ACKNOWLEDGE | S.DRIVER | S.DRIVER_OK)
        assert not guest.get("device_status") & S.DRIVER_OK

    def test_features_are_settled(self, guest: Guest) -> None:
        guest.negotiate(V1)
        guest.set("driver_feature_select", 0)
        guest.set("driver_feature", Echo.FEATURE)
        assert guest.function.features == V1

    def test_bits_stay_until_reset(self, guest: Guest) -> None:
        guest.negotiate(V1)
        guest.set("device_status", S.FAILED)
        assert guest.get("device_status") == S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK | S.FAILED

    def test_the_driver_cannot_ask_for_a_reset(self, guest: Guest) -> None:
        guest.set("device_status", S.NEEDS_RESET | S.ACKNOWLEDGE)
        assert guest.get("device_status") == S.ACKNOWLEDGE

    def test_reset(self, echo: Echo, guest: Guest) -> None:
        guest.start(V1, (0, 1))
        echo.log.clear()
        guest.set("device_status", 0)
        assert echo.log == ["stop", "reset"]
        assert guest.get("device_status") == 0
        assert guest.get("config_msix_vector") == NO_VECTOR
        assert guest.get("queue_select") == 0
        for index in (0, 1):
            guest.set("queue_select", index)
            assert (guest.get("queue_enable"), guest.get("queue_size")) == (0, 64)
            assert (guest.get("queue_desc"), guest.get("queue_msix_vector")) == (0, NO_VECTOR)
        assert not guest.function.queues

    def test_resets_by_other_means(self, echo: Echo, guest: Guest) -> None:
        power = dict(guest.function.config.capabilities())[CapId.PM] + 4
        for reset in ("message", "flr", "power", "message"):
            guest.rings.clear()
            guest.start(V1)
            guest.client.set_config(0x04, 0x0406, 2)
            if reset == "message":
                guest.client.call(Message.DEVICE_RESET)
            elif reset == "power":
                guest.client.set_config(power, 3, 2)
                assert guest.function.queues, "going to sleep loses nothing yet"
                guest.client.set_config(power, 0, 2)
            else:
                guest.client.set_config(guest.express + 8, 0x8000, 2)
                assert guest.client.config(guest.express + 8, 2) == 0
            assert guest.get("device_status") == 0
            assert guest.client.config(0x04, 2) == 0
            assert guest.client.config(guest.msix + 2, 2) == 2
            assert not guest.function.queues


class TestDeviceConfiguration:
    def test_reading_and_writing(self, echo: Echo, guest: Guest) -> None:
        assert guest.read_config(0, 6) == b"\1\2\3\4\5\6"
        assert guest.read_config(2, 2) == b"\3\4"
        guest.write_config(4, b"\xaa\xbb")
        assert echo.log[-1] == "config 4 aabb"
        assert guest.read_config(4, 2) == b"\xaa\xbb"

    def test_past_the_end(self, echo: Echo, guest: Guest) -> None:
        assert guest.read_config(4, 8) == b"\5\6\0\0\0\0\0\0"
        guest.write_config(4, b"\xaa\xbb\xcc\xdd")
        assert echo.log[-1] == "config 4 aabb"
        guest.write_config(6, b"\xee")
        assert echo.log[-1] == "config 4 aabb"

    def test_generation_changes_with_what_is_seen(self, echo: Echo, guest: Guest) -> None:
        before = guest.get("config_generation")
        guest.read_config(0, 4)
        assert guest.get("config_generation") == before
        echo.config[5] = 99
        after = guest.get("config_generation")
        assert after != before
        assert guest.get("config_generation") == after

    def test_a_change_between_two_reads_shows(self, echo: Echo, guest: Guest) -> None:
        before = guest.get("config_generation")
        guest.read_config(0, 4)
        echo.config[5] = 99
        guest.read_config(4, 2)
        assert guest.get("config_generation") != before

    def test_change_notification(self, echo: Echo, guest: Guest) -> None:
        guest.start(V1)
        guest.function.config_changed()
        assert guest.interrupts() == [1, 0, 0]
        assert guest.isr() == 2, "set with MSI-X, too"

    def test_no_notification_before_the_driver_is_ready(self, guest: Guest) -> None:
        guest.negotiate(V1)
        guest.use_msix()
        guest.set("config_msix_vector", 0)
        guest.function.config_changed()
        assert guest.interrupts() == [0, 0, 0]


class TestMsixVectorConfiguration:
    def test_vectors_that_are_not_there(self, guest: Guest) -> None:
        assert guest.msix_cap.control & 0x7FF == 2
        for name in ("config_msix_vector", "queue_msix_vector"):
            assert guest.get(name) == NO_VECTOR
            guest.set(name, 2)
            assert guest.get(name) == 2
            guest.set(name, 3)
            assert guest.get(name) == NO_VECTOR

    def test_function_mask_holds_everything_back(self, guest: Guest) -> None:
        guest.start(V1)
        guest.client.set_config(guest.msix + 2, 0xC000, 2)
        guest.function.config_changed()
        assert guest.interrupts() == [0, 0, 0]
        pba = guest.msix_cap.pba & ~7
        assert guest.client.read(2, pba, 8) == b"\1" + bytes(7)
        guest.client.set_config(guest.msix + 2, 0x8000, 2)
        assert guest.interrupts() == [1, 0, 0]
        assert guest.client.read(2, pba, 8) == bytes(8)

    def test_the_table_masks_once_it_is_written(self, guest: Guest) -> None:
        guest.start(V1)
        assert guest.client.read(2, 12, 4) == b"\1\0\0\0", "masked after reset"
        entry = bytes(range(12))
        guest.client.write(2, 0, entry + b"\1\0\0\0")
        guest.function.config_changed()
        assert guest.interrupts() == [0, 0, 0]
        guest.client.write(2, 12, bytes(4))
        assert guest.interrupts() == [1, 0, 0]
        assert guest.client.read(2, 0, 16) == entry + bytes(4)

    def test_the_pending_bits_cannot_be_written(self, guest: Guest) -> None:
        pba = guest.msix_cap.pba & ~7
        guest.client.write(2, pba, b"\xff" * 8)
        assert guest.client.read(2, pba, 8) == bytes(8)
        guest.client.write(2, 1, b"\xff", expect=errno.EINVAL)

    def test_control_keeps_its_size(self, guest: Guest) -> None:
        guest.client.set_config(guest.msix + 2, 0xFFFF, 2)
        assert guest.client.config(guest.msix + 2, 2) == 0xC002


class TestIsrStatusCapability:
    @pytest.fixture
    def plain(self, guest: Guest) -> Guest:
        """Return a guest without MSI-X."""
        assert guest.negotiate(V1)
        guest.use_intx()
        guest.set("device_status", S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK | S.DRIVER_OK)
        return guest

    def test_asserted_until_it_is_read(self, plain: Guest) -> None:
        plain.function.config_changed()
        assert events(plain.intx) == 1
        assert plain.client.config(0x06, 2) & 8, "Interrupt Status"
        plain.unmask_intx()
        assert events(plain.intx) == 1, "a level: it is still asserted"
        assert plain.isr() == 2
        assert plain.isr() == 0
        assert not plain.client.config(0x06, 2) & 8
        plain.unmask_intx()
        assert events(plain.intx) == 0

    def test_intx_can_be_disabled(self, plain: Guest) -> None:
        plain.client.set_config(0x04, Command.INTX_DISABLE, 2)
        plain.function.config_changed()
        assert events(plain.intx) == 0
        assert plain.client.config(0x06, 2) & 8
        plain.client.set_config(0x04, 0, 2)
        assert events(plain.intx) == 1

    def test_enabling_msix_takes_it_back(self, plain: Guest) -> None:
        plain.function.config_changed()
        plain.client.set_config(plain.msix + 2, 0x8000, 2)
        assert not plain.client.config(0x06, 2) & 8
        plain.unmask_intx()
        assert events(plain.intx) == 1  # the one from before

    def test_bytes_behind_it_clear_nothing(self, plain: Guest) -> None:
        plain.function.config_changed()
        cap = plain.caps[CapType.ISR_CFG]
        assert plain.client.read(cap.bar, cap.offset + 1, 3) == bytes(3)
        assert plain.isr() == 2


class TestPciConfigurationAccessCapability:
    def access(self, guest: Guest, bar: int, offset: int, length: int) -> None:
        at = guest.window
        guest.client.set_config(at + 4, bar, 1)
        guest.client.set_config(at + 8, offset, 4)
        guest.client.set_config(at + 12, length, 4)

    def test_reading(self, guest: Guest) -> None:
        cap = guest.caps[CapType.COMMON_CFG]
        self.access(guest, cap.bar, cap.offset + 18, 2)
        assert guest.client.config(guest.window + 16, 2) == 2

    def test_writing(self, guest: Guest) -> None:
        cap = guest.caps[CapType.COMMON_CFG]
        self.access(guest, cap.bar, cap.offset + 20, 1)
        guest.client.set_config(guest.window + 16, S.ACKNOWLEDGE, 1)
        assert guest.get("device_status") == S.ACKNOWLEDGE

    @pytest.mark.parametrize(
        ("bar", "offset", "length"),
        [(6, 0, 4), (255, 0, 4), (5, 0, 4), (0, 2, 4), (0, 0, 3), (0, 0, 0), (0, 1 << 31, 4)],
    )
    def test_what_the_driver_must_not_do(
        self, guest: Guest, bar: int, offset: int, length: int
    ) -> None:
        self.access(guest, bar, offset, length)
        guest.client.config(guest.window + 16, 4)
        guest.client.set_config(guest.window + 16, 0xFFFFFFFF, 4)
        assert guest.get("device_status") == 0


def test_interrupt_indices(guest: Guest) -> None:
    assert [guest.function.irqs.count(i) for i in PciIrq] == [1, 0, 3, 1, 0]


class TestWithoutMsix:
    """INTx only, for a machine from which the device is to be unplugged."""

    @pytest.fixture
    def guest(self, echo: Echo) -> Iterator[Guest]:
        function = VirtioPciFunction(echo, msix=False)
        guest = Guest(function)
        yield guest
        guest.close()
        function.close()

    def test_nothing_of_it_shows(self, guest: Guest) -> None:
        assert CapId.MSIX not in [cap for cap, _ in guest.function.config.capabilities()]
        assert guest.function.irqs.count(PciIrq.MSIX) == 0
        guest.client.set_config(0x18, 0xFFFFFFFF, 4)
        assert guest.client.config(0x18, 4) == 0
        guest.set("config_msix_vector", 0)
        assert guest.get("config_msix_vector") == NO_VECTOR

    def test_interrupts(self, guest: Guest) -> None:
        guest.negotiate(V1)
        guest.use_intx()
        guest.set("device_status", S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK | S.DRIVER_OK)
        guest.function.config_changed()
        assert events(guest.intx) == 1
        assert guest.isr() == 2
