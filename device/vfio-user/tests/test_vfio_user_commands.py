# SPDX-License-Identifier: Apache-2.0
"""``vfio_user.handlers``, ``regions``, ``config``: a test for each thing said of a command.

vfio-user specification (QEMU 11.1); the classes are named as its sections.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Iterator

import pytest
from gadget import BAR0_SIZE, BAR2_SIZE, FAIL, Gadget
from helpers import open_fds
from hypothesis import given
from hypothesis import strategies as st

from vfio_user import ConfigSpace, IoEvent, PciDevice, Region, SessionLimits, UsageError
from vfio_user.testing import LocalClient, events
from virtio_formats.pci import BarFlags
from virtio_formats.vfio_user import (
    Command,
    DeviceInfo,
    IoEventFd,
    IrqInfo,
    PciIrq,
    PciRegion,
    RegionAccess,
    RegionFlags,
    RegionInfo,
    RegionIoFds,
    SparseMmap,
    SparseMmapArea,
    WriteMulti,
    WriteOne,
)

AREAS = ((0x2000, 0x1000), (0x4000, 0x2000))


@pytest.fixture
def gadget() -> Iterator[Gadget]:
    device = Gadget(areas=AREAS)
    yield device
    device.close()


@pytest.fixture
def client(gadget: Gadget) -> Iterator[LocalClient]:
    client = LocalClient(gadget)
    client.negotiate()
    open_before = open_fds()
    yield client
    client.close()
    assert open_fds() == open_before, "descriptors leaked"


class TestDeviceGetInfo:
    def info(self, argsz: int) -> bytes:
        return DeviceInfo(argsz=argsz, flags=0, num_regions=0, num_irqs=0).build()

    @pytest.mark.parametrize("argsz", [16, 32])
    def test_a_pci_device_that_can_be_reset(self, client: LocalClient, argsz: int) -> None:
        reply = client.call(Command.DEVICE_GET_INFO, self.info(argsz))
        info = DeviceInfo.parse(reply.payload)
        assert (info.argsz, info.flags, info.num_regions, info.num_irqs) == (16, 3, 9, 5)

    def test_bad_sizes(self, client: LocalClient) -> None:
        client.call(Command.DEVICE_GET_INFO, self.info(8), expect=errno.EINVAL)
        client.call(Command.DEVICE_GET_INFO, bytes(8), expect=errno.EINVAL)
        client.call(Command.DEVICE_GET_INFO, self.info(16) + b"\0", expect=errno.EINVAL)


class TestDeviceGetRegionInfo:
    def ask(
        self, client: LocalClient, index: int, argsz: int = 32, expect: int = 0
    ) -> tuple[RegionInfo, bytes, list[int]]:
        request = RegionInfo(argsz=argsz, flags=0, index=index, cap_offset=0, size=0, offset=0)
        reply = client.call(Command.DEVICE_GET_REGION_INFO, request.build(), expect=expect)
        if expect:
            return request, b"", []
        assert len(reply.payload) <= argsz
        return RegionInfo.parse(reply.payload[:32]), reply.payload[32:], reply.fds

    def test_a_region_of_functions(self, client: LocalClient) -> None:
        info, caps, fds = self.ask(client, PciRegion.BAR0, argsz=64)
        assert (info.argsz, info.index, info.cap_offset, info.size) == (32, 0, 0, BAR0_SIZE)
        assert info.flags == RegionFlags.READ | RegionFlags.WRITE
        assert (caps, fds) == (b"", [])

    def test_configuration_space(self, client: LocalClient) -> None:
        info, _, _ = self.ask(client, PciRegion.CONFIG)
        assert (info.size, info.flags) == (4096, RegionFlags.READ | RegionFlags.WRITE)

    def test_a_region_that_is_not_there(self, client: LocalClient) -> None:
        info, _, _ = self.ask(client, PciRegion.ROM)
        assert (info.size, info.flags) == (0, 0)

    def test_a_read_only_region(self, client: LocalClient) -> None:
        assert self.ask(client, PciRegion.BAR4)[0].flags == RegionFlags.READ

    def test_capabilities_that_do_not_fit_are_announced_by_argsz(self, client: LocalClient) -> None:
        """A CAPS flag without a capability makes QEMU refuse the region."""
        info, caps, fds = self.ask(client, PciRegion.BAR2)
        assert (info.argsz, info.cap_offset, caps) == (32 + 16 + 2 * 16, 0, b"")
        assert info.flags == RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP
        assert len(fds) == 1
        os.close(fds[0])

    def test_sparse_areas_and_the_file(self, gadget: Gadget, client: LocalClient) -> None:
        info, caps, fds = self.ask(client, PciRegion.BAR2, argsz=80)
        assert (info.argsz, info.cap_offset, info.size, info.offset) == (80, 32, 0x8000, 0x8000)
        assert info.flags & RegionFlags.CAPS
        head = SparseMmap.parse(caps[:16])
        assert (head.id, head.version, head.next, head.nr_areas) == (1, 1, 0, 2)
        areas = [SparseMmapArea.parse(caps[at : at + 16]) for at in (16, 32)]
        assert tuple((a.offset, a.size) for a in areas) == AREAS
        with mmap.mmap(fds[0], 0x1000, offset=info.offset + AREAS[0][0]) as area:
            area[:4] = b"mmap"
            assert client.read(PciRegion.BAR2, AREAS[0][0], 4) == b"mmap"
        os.close(fds[0])

    def test_a_file_that_is_mapped_whole_has_no_capability(self) -> None:
        device = Gadget()
        client = LocalClient(device)
        client.negotiate()
        info, caps, fds = self.ask(client, PciRegion.BAR2, argsz=80)
        assert (info.argsz, caps, len(fds)) == (32, b"", 1)
        os.close(fds[0])
        client.close()
        device.close()

    def test_bad_requests(self, client: LocalClient) -> None:
        self.ask(client, PciRegion.BAR0, argsz=8, expect=errno.EINVAL)
        self.ask(client, 9, expect=errno.EINVAL)
        self.ask(client, 0xFFFFFFFF, expect=errno.EINVAL)
        client.call(Command.DEVICE_GET_REGION_INFO, bytes(8), expect=errno.EINVAL)


class TestDeviceGetRegionIoFds:
    def ask(self, client: LocalClient, index: int, argsz: int, **fields: int) -> bytes:
        values = {"argsz": argsz, "flags": 0, "index": index, "count": 0, **fields}
        return RegionIoFds(**values).build()

    def test_shared_descriptors_go_out_once(self, gadget: Gadget, client: LocalClient) -> None:
        request = self.ask(client, PciRegion.BAR0, 16 + 80)
        reply = client.call(Command.DEVICE_GET_REGION_IO_FDS, request)
        head = RegionIoFds.parse(reply.payload[:16])
        assert (head.argsz, head.flags, head.index, head.count) == (96, 0, 0, 2)
        subs = [IoEventFd.parse(reply.payload[at : at + 40]) for at in (16, 56)]
        assert [(s.offset, s.size, s.fd_index, s.type) for s in subs] == [
            (0, 4, 0, 0),
            (8, 8, 0, 0),
        ]
        assert [(s.flags, s.datamatch) for s in subs] == [(0, 0), (1, 7)]
        assert len(reply.fds) == 1
        os.eventfd_write(reply.fds[0], 10)
        assert events(gadget.kick) == 10
        os.close(reply.fds[0])

    def test_too_little_room_says_how_much(self, client: LocalClient) -> None:
        reply = client.call(Command.DEVICE_GET_REGION_IO_FDS, self.ask(client, PciRegion.BAR0, 16))
        head = RegionIoFds.parse(reply.payload)
        assert (head.argsz, head.count, reply.fds) == (96, 0, [])

    @pytest.mark.parametrize("index", [PciRegion.BAR2, PciRegion.CONFIG])
    def test_a_region_without_any(self, client: LocalClient, index: int) -> None:
        reply = client.call(Command.DEVICE_GET_REGION_IO_FDS, self.ask(client, index, 512))
        head = RegionIoFds.parse(reply.payload)
        assert (head.argsz, head.count, head.index) == (16, 0, index)

    def test_bad_requests(self, client: LocalClient) -> None:
        for request in (
            self.ask(client, 0, 96, flags=1),
            self.ask(client, 0, 96, count=1),
            self.ask(client, 0, 15),
            self.ask(client, 0, (1 << 20) + 1),
            self.ask(client, PciRegion.BAR3, 512),
            self.ask(client, 512, 512),
        ):
            client.call(Command.DEVICE_GET_REGION_IO_FDS, request, expect=errno.EINVAL)

    def test_more_descriptors_than_the_client_takes(self, gadget: Gadget) -> None:
        client = LocalClient(gadget)
        client.negotiate(b'{"capabilities":{"max_msg_fds":0}}' + b" " * 99 + b"\0")
        request = self.ask(client, PciRegion.BAR0, 96)
        client.call(Command.DEVICE_GET_REGION_IO_FDS, request, expect=errno.ENOSPC)
        client.close()

    def test_declared_outside_of_the_region(self) -> None:
        event = IoEvent(0, 0x800, 4096, lambda: None)
        with pytest.raises(UsageError):
            Region(0x1000, read=lambda o, n: bytes(n), io_events=[event])


class TestRegionAccess:
    """``VFIO_USER_REGION_READ``, ``VFIO_USER_REGION_WRITE``"""

    def test_write_and_read(self, gadget: Gadget, client: LocalClient) -> None:
        client.write(0, 0x10, b"hello")
        assert client.read(0, 0x10, 5) == b"hello"
        assert gadget.log[-2:] == [("write", 0x10, b"hello"), ("read", 0x10, 5)]

    def test_at_the_end(self, client: LocalClient) -> None:
        client.write(0, BAR0_SIZE - 1, b"x")
        assert client.read(0, BAR0_SIZE - 1, 1) == b"x"

    def test_nothing(self, client: LocalClient) -> None:
        assert client.read(0, 0, 0) == b""
        client.write(0, 0, b"")

    @pytest.mark.parametrize(
        ("region", "offset", "count"),
        [
            (0, BAR0_SIZE, 1),
            (0, BAR0_SIZE - 1, 2),
            (0, 2**64 - 1, 1),
            (0, 2**64 - 2, 4),
            (PciRegion.ROM, 0, 1),
            (PciRegion.CONFIG, 4095, 2),
            (9, 0, 1),
            (0xFFFFFFFF, 0, 1),
        ],
    )
    def test_out_of_bounds(self, client: LocalClient, region: int, offset: int, count: int) -> None:
        client.read(region, offset, count, expect=errno.EINVAL)
        client.write(region, offset, bytes(count), expect=errno.EINVAL)

    def test_read_only(self, client: LocalClient) -> None:
        client.write(PciRegion.BAR4, 0, b"x", expect=errno.EPERM)

    def test_more_than_was_agreed(self, gadget: Gadget) -> None:
        client = LocalClient(gadget, limits=SessionLimits(max_data_xfer_size=8))
        client.negotiate()
        client.read(0, 0, 9, expect=errno.EINVAL)
        client.write(0, 0, bytes(9), expect=errno.EINVAL)
        assert client.read(0, 0, 8) == bytes(8)
        client.close()

    def test_count_must_match_the_data(self, client: LocalClient) -> None:
        head = RegionAccess(offset=0, region=0, count=4).build()
        client.call(Command.REGION_WRITE, head + b"abc", expect=errno.EINVAL)
        client.call(Command.REGION_WRITE, head + b"abcde", expect=errno.EINVAL)
        client.call(Command.REGION_READ, head + b"abcd", expect=errno.EINVAL)

    def test_a_file_behind_a_region(self, gadget: Gadget, client: LocalClient) -> None:
        client.write(PciRegion.BAR2, 0, b"file")
        assert os.pread(gadget.file, 4, 0x8000) == b"file"
        assert client.read(PciRegion.BAR2, BAR2_SIZE - 4, 4) == bytes(4)


class TestRegionWriteMulti:
    def payload(self, *writes: tuple[int, int, int, bytes], count: int | None = None) -> bytes:
        body = b"".join(
            WriteOne(offset=o, region=r, count=n, data=d.ljust(8, b"\0")).build()
            for o, r, n, d in writes
        )
        return WriteMulti(wr_cnt=len(writes) if count is None else count).build() + body

    def test_in_order(self, gadget: Gadget, client: LocalClient) -> None:
        request = self.payload((0, 0, 4, b"aaaa"), (2, 0, 2, b"bb"), (8, 0, 8, b"12345678"))
        reply = client.call(Command.REGION_WRITE_MULTI, request)
        assert WriteMulti.parse(reply.payload).wr_cnt == 3
        assert client.read(0, 0, 16) == b"aabb\0\0\0\x0012345678"

    def test_none(self, client: LocalClient) -> None:
        reply = client.call(Command.REGION_WRITE_MULTI, self.payload())
        assert WriteMulti.parse(reply.payload).wr_cnt == 0

    def test_up_to_the_first_that_is_refused(self, gadget: Gadget, client: LocalClient) -> None:
        request = self.payload((0, 0, 1, b"x"), (FAIL, 0, 1, b"y"), (1, 0, 1, b"z"))
        reply = client.call(Command.REGION_WRITE_MULTI, request)
        assert WriteMulti.parse(reply.payload).wr_cnt == 1
        assert client.read(0, 0, 2) == b"x\0"

    def test_bad_requests(self, client: LocalClient) -> None:
        for request in (
            self.payload((0, 0, 9, b"")),
            self.payload((0, 0, 1, b"x"), count=2),
            self.payload((0, 0, 1, b"x"), count=0),
            self.payload(count=2**61),
            self.payload((BAR0_SIZE, 0, 1, b"x")),
            self.payload((0, 77, 1, b"x")),
        ):
            client.call(Command.REGION_WRITE_MULTI, request, expect=errno.EINVAL)
        client.call(
            Command.REGION_WRITE_MULTI, self.payload((FAIL, 0, 1, b"x")), expect=errno.ENOSPC
        )


class TestDeviceReset:
    def test_configuration_space_and_registers(self, gadget: Gadget, client: LocalClient) -> None:
        client.set_config(0x04, 0x6, 2)
        client.set_config(0x10, 0xFEB00000, 4)
        gadget.irqs.trigger(2, 5)
        client.call(Command.DEVICE_RESET)
        assert client.config(0x04, 2) == 0
        assert client.config(0x10, 4) == 0
        assert not any(gadget.irqs.pending(2))
        assert gadget.log[-1] == ("reset",)

    def test_with_a_payload(self, client: LocalClient) -> None:
        client.call(Command.DEVICE_RESET, b"\0", expect=errno.EINVAL)


class TestConfigSpace:
    """PCI configuration space, as a client that plays firmware finds it."""

    @pytest.mark.parametrize(
        ("bar", "answer"),
        [(0, 0xFFFFF000), (1, 0), (2, 0xFFFF8004), (3, 0xFFFFFFFF), (4, 0xFFFFFFF1), (5, 0)],
    )
    def test_sizing_bars(self, client: LocalClient, bar: int, answer: int) -> None:
        client.set_config(0x10 + 4 * bar, 0xFFFFFFFF, 4)
        assert client.config(0x10 + 4 * bar, 4) == answer

    def test_ids_cannot_be_written(self, client: LocalClient) -> None:
        client.set_config(0, 0xFFFFFFFF, 4)
        assert client.config(0, 4) == 0x11E81234
        client.set_config(0x2C, 0xFFFFFFFF, 4)
        assert client.config(0x2C, 4) == 0x11E81234

    def test_command_keeps_its_bits_only(self, client: LocalClient) -> None:
        client.set_config(0x04, 0xFFFF, 2)
        assert client.config(0x04, 2) == 0x0547

    def test_interrupt_line_and_pin(self, client: LocalClient) -> None:
        client.set_config(0x3C, 0xFFFF, 2)
        assert client.config(0x3C, 2) == 0x01FF

    def test_bytewise_and_across_registers(self, client: LocalClient) -> None:
        client.set_config(0x05, 0xFF04, 2)
        assert client.config(0x04, 4) == 0x0400

    def test_the_capability_list(self) -> None:
        space = ConfigSpace(vendor_id=1, device_id=2)
        assert space.capabilities() == []
        first = space.add_capability(b"\x01\0abcdef", b"\xff\xff\x0f")
        second = space.add_capability(b"\x09\0\x05xyz")
        third = space.add_capability(b"\x09\0\x04!")
        assert (first, second, third) == (0x40, 0x48, 0x50)
        assert space.capabilities() == [(1, 0x40), (9, 0x48), (9, 0x50)]
        assert space.word(0x06) == 0x10
        space.write(first, b"\xff" * 8)
        assert space.read(first, 8) == b"\x01\x48\x6fbcdef"

    def test_a_capability_without_room(self) -> None:
        space = ConfigSpace(vendor_id=1, device_id=2)
        for _ in range(3):
            space.add_capability(bytes(64))
        with pytest.raises(UsageError):
            space.add_capability(b"\x09\0")

    def test_extended_capabilities(self) -> None:
        space = ConfigSpace(vendor_id=1, device_id=2)
        assert space.extended_capabilities() == []
        first = space.add_extended_capability(3, bytes(8))  # a serial number
        second = space.add_extended_capability(11, b"vendor", writable=b"\xff")
        third = space.add_extended_capability(11, b"")
        assert (first, second, third) == (0x100, 0x10C, 0x118)
        assert space.extended_capabilities() == [(3, 0x100), (11, 0x10C), (11, 0x118)]
        assert space.long(0x100) == 0x10C10003
        space.write(second, b"\0" * 10)
        assert space.long(second) == 0x1181000B, "the header cannot be written"
        assert space.read(second + 4, 6) == b"\0endor"

    def test_extended_capabilities_without_room(self) -> None:
        with pytest.raises(UsageError):
            ConfigSpace(vendor_id=1, device_id=2, express=False).add_extended_capability(3, b"")
        space = ConfigSpace(vendor_id=1, device_id=2)
        space.add_extended_capability(3, bytes(4096 - 256 - 4))
        with pytest.raises(UsageError):
            space.add_extended_capability(3, b"")

    @pytest.mark.parametrize(
        ("index", "size", "bar"),
        [
            (0, 3, BarFlags.MEMORY_32),
            (0, 8, BarFlags.MEMORY_32),
            (0, 0x3000, BarFlags.MEMORY_32),
            (0, 1 << 32, BarFlags.MEMORY_32),
            (5, 0x1000, BarFlags.MEMORY_64),
        ],
    )
    def test_bars_that_cannot_be(self, index: int, size: int, bar: BarFlags) -> None:
        region = Region(size, read=lambda o, n: bytes(n), bar=bar)
        with pytest.raises(UsageError):
            ConfigSpace(vendor_id=1, device_id=2).add_bar(index, region)

    def test_bars_that_overlap(self) -> None:
        wide = Region(0x1000, read=lambda o, n: bytes(n), bar=BarFlags.MEMORY_64)
        narrow = Region(0x1000, read=lambda o, n: bytes(n))
        with pytest.raises(UsageError):
            PciDevice(ConfigSpace(vendor_id=1, device_id=2), {0: wide, 1: narrow}, {})

    @given(st.lists(st.tuples(st.integers(0, 0x44), st.binary(min_size=1, max_size=8))))
    def test_no_write_changes_what_is_read_only(self, writes: list[tuple[int, bytes]]) -> None:
        space = ConfigSpace(vendor_id=0x1AF4, device_id=0x1045, revision_id=1, express=False)
        space.add_capability(struct.pack("<BBHI", 1, 0, 3, 8))
        before = space.read(0, 256)
        for offset, data in writes:
            space.write(offset, data)
        after = space.read(0, 256)
        writable = {4, 5, 0x0C, 0x3C}
        assert [i for i in range(256) if after[i] != before[i] and i not in writable] == []
        space.reset()
        assert space.read(0, 256) == before


class TestRegionDeclarations:
    @pytest.mark.parametrize(
        "areas",
        [
            ((0x100, 0x1000),),
            ((0, 0x800),),
            ((0, 0),),
            ((0, 0x2000), (0x1000, 0x1000)),
            ((0x1000, 0x1000), (0, 0x1000)),
            ((0x7000, 0x2000),),
        ],
    )
    def test_areas_that_cannot_be_mapped(self, areas: tuple[tuple[int, int], ...]) -> None:
        with pytest.raises(UsageError):
            Region(0x8000, fd=1, areas=areas)

    def test_regions_that_cannot_be_served(self) -> None:
        with pytest.raises(UsageError):
            Region(0x1000)
        with pytest.raises(UsageError):
            Region(-1)
        with pytest.raises(UsageError):
            Region(0x1000, read=lambda o, n: bytes(n), areas=((0, 0x1000),))

    def test_a_function_that_returns_too_little(self) -> None:
        device = PciDevice(
            ConfigSpace(vendor_id=1, device_id=2), {0: Region(16, read=lambda o, n: b"")}, {}
        )
        client = LocalClient(device)
        client.negotiate()
        client.read(0, 0, 4, expect=errno.EIO)
        client.close()


class TestClientsOfOtherVersions:
    """Linux appends fields to the structures of VFIO; their clients were refused."""

    @pytest.mark.parametrize("size", [20, 24, 64])
    def test_get_info(self, client: LocalClient, size: int) -> None:
        request = struct.pack("=I", size).ljust(size, b"\0")
        reply = client.call(Command.DEVICE_GET_INFO, request).payload
        assert len(reply) == size
        assert DeviceInfo.parse(reply[:16]).num_regions == 9
        assert not any(reply[16:])

    def test_get_irq_info(self, client: LocalClient) -> None:
        request = struct.pack("=IIIII", 20, 0, PciIrq.MSIX, 0, 0)
        reply = client.call(Command.DEVICE_GET_IRQ_INFO, request).payload
        assert (len(reply), IrqInfo.parse(reply[:16]).count) == (20, 2048)

    def test_but_not_any_size(self, client: LocalClient) -> None:
        for size in (17, 84):
            client.call(Command.DEVICE_GET_INFO, struct.pack("=I", size).ljust(size), expect=22)


class TestExpansionRom:
    def rom(self, size: int) -> PciDevice:
        rom = Region(size, read=lambda offset, count: b"\x55\xaa".ljust(count, b"\0"))
        return PciDevice(ConfigSpace(vendor_id=1, device_id=2), {PciRegion.ROM: rom}, {})

    def test_it_is_sized_and_enabled(self) -> None:
        """It could be read, but the register that shows it to a guest stayed zero."""
        client = LocalClient(self.rom(0x10000))
        client.negotiate()
        client.set_config(0x30, 0xFFFFF800, 4)
        assert client.config(0x30, 4) == 0xFFFF0000
        client.set_config(0x30, 0xFEB00001, 4)
        assert client.config(0x30, 4) == 0xFEB00001
        assert client.read(PciRegion.ROM, 0, 2) == b"\x55\xaa"
        client.write(PciRegion.ROM, 0, b"x", expect=errno.EPERM)
        client.close()

    @pytest.mark.parametrize("size", [1024, 0x3000, 1 << 32])
    def test_sizes_that_cannot_be(self, size: int) -> None:
        with pytest.raises(UsageError):
            self.rom(size)


def test_an_ioeventfd_in_an_io_bar_says_so() -> None:
    """Without KVM_IOEVENTFD_FLAG_PIO the hypervisor watches a memory address."""
    kick = os.eventfd(0)
    bar = Region(
        16,
        read=lambda offset, count: bytes(count),
        bar=BarFlags.IO,
        io_events=[IoEvent(kick, 0, 4, lambda: None), IoEvent(kick, 4, 4, lambda: None, 5)],
    )
    config = ConfigSpace(vendor_id=1, device_id=2)
    client = LocalClient(PciDevice(config, {PciRegion.BAR0: bar}, {}))
    client.negotiate()
    request = RegionIoFds(argsz=4096, flags=0, index=0, count=0).build()
    reply = client.call(Command.DEVICE_GET_REGION_IO_FDS, request)
    assert [IoEventFd.parse(reply.payload[at : at + 40]).flags for at in (16, 56)] == [2, 3]
    client.close()
    for fd in (kick, *reply.fds):
        os.close(fd)


def test_an_ioeventfd_needs_a_descriptor() -> None:
    with pytest.raises(UsageError, match="descriptor -1"):
        IoEvent(-1, 0, 4, lambda: None)
