# SPDX-License-Identifier: Apache-2.0
"""``vfio_user.dirty``: which of the client's memory the device has written.

vfio-user specification (QEMU 11.1), ``VFIO_DEVICE_FEATURE_DMA_LOGGING_START`` to ``_REPORT``.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from gadget import Gadget
from helpers import open_fds
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user import DmaLog
from vfio_user.testing import LocalClient, Ram
from virtio_formats.vfio_user import (
    Command,
    DeviceFeature,
    Feature,
    FeatureFlags,
    LoggingControl,
    LoggingRange,
    LoggingReport,
)

PAGE = 4096
BASE = 0x10000


@pytest.fixture
def gadget() -> Iterator[Gadget]:
    device = Gadget()
    yield device
    device.close()


@pytest.fixture
def client(gadget: Gadget) -> Iterator[LocalClient]:
    client = LocalClient(gadget)
    client.negotiate()
    open_before = open_fds()
    yield client
    client.close()
    for ram in client.ram:
        ram.close()
    assert open_fds() == open_before, "descriptors leaked"


def test_a_report_of_half_a_page_keeps_it_for_the_other_half() -> None:
    """Reported in units of half a page, the second half was forgotten with the first."""
    log = DmaLog()
    log.start(PAGE, ())
    log.mark(BASE, 2 * PAGE)
    assert log.report(BASE, PAGE // 2, PAGE // 2, 64) == (1).to_bytes(8, "little")
    assert log.report(BASE + PAGE // 2, 3 * PAGE // 2, PAGE // 2, 64) == (7).to_bytes(8, "little")
    assert log.report(BASE + PAGE, PAGE, PAGE, 64) == bytes(8), "a whole page is forgotten"


class TestLogging:
    """``VFIO_DEVICE_FEATURE_DMA_LOGGING_*``"""

    START = Feature.DMA_LOGGING_START | FeatureFlags.SET
    STOP = Feature.DMA_LOGGING_STOP | FeatureFlags.SET
    REPORT = Feature.DMA_LOGGING_REPORT | FeatureFlags.GET

    def start(
        self, client: LocalClient, page_size: int = PAGE, *ranges: tuple[int, int], expect: int = 0
    ) -> bytes:
        control = LoggingControl(page_size=page_size, num_ranges=len(ranges), reserved=0).build()
        control += b"".join(LoggingRange(iova=i, length=n).build() for i, n in ranges)
        head = DeviceFeature(argsz=8 + len(control), flags=self.START).build()
        return client.call(Command.DEVICE_FEATURE, head + control, expect=expect).payload

    def report(
        self, client: LocalClient, iova: int, length: int, page_size: int = PAGE, expect: int = 0
    ) -> int:
        words = -(-(-(-length // page_size) if page_size else 1) // 64)
        report = LoggingReport(iova=iova, length=length, page_size=page_size).build()
        head = DeviceFeature(argsz=32 + 8 * words, flags=self.REPORT).build()
        reply = client.call(Command.DEVICE_FEATURE, head + report, expect=expect)
        if expect:
            return 0
        assert DeviceFeature.parse(reply.payload[:8]).argsz == len(reply.payload) == 32 + 8 * words
        return int.from_bytes(reply.payload[32:], "little")

    @pytest.fixture
    def logging(self, client: LocalClient) -> LocalClient:
        client.map(Ram(BASE, 0x20 * PAGE))
        client.map(Ram(0x40 * PAGE, 0x10 * PAGE), mapped=False)
        self.start(client)
        return client

    def test_only_writes_and_only_since_the_last_report(
        self, gadget: Gadget, logging: LocalClient
    ) -> None:
        assert self.report(logging, BASE, 0x20 * PAGE) == 0
        gadget.dma.write(BASE, b"x")
        gadget.dma.write(BASE + 6 * PAGE - 1, bytes(2 * PAGE + 2))
        gadget.dma.read(BASE + 10 * PAGE, 4)
        assert self.report(logging, BASE, 0x20 * PAGE) == 0b111100001 | 0b100000000
        assert self.report(logging, BASE, 0x20 * PAGE) == 0

    def test_other_page_sizes(self, gadget: Gadget, logging: LocalClient) -> None:
        def write() -> None:
            gadget.dma.write(BASE, b"x")
            gadget.dma.write(BASE + 6 * PAGE, bytes(4 * PAGE))

        write()
        assert self.report(logging, BASE, 0x10 * PAGE, PAGE // 2) == 0xFF003
        write()
        assert self.report(logging, BASE, 0x10 * PAGE, PAGE * 2) == 0b11001
        write()
        assert self.report(logging, BASE, 0x10 * PAGE, PAGE * 16) == 1

    def test_memory_reached_by_messages(self, gadget: Gadget, logging: LocalClient) -> None:
        gadget.dma.write(0x41 * PAGE, b"x")
        assert self.report(logging, 0x40 * PAGE, 0x10 * PAGE) == 0b10

    def test_ranges(self, gadget: Gadget, client: LocalClient) -> None:
        client.map(Ram(BASE, 0x20 * PAGE))
        self.start(client, PAGE, (BASE + PAGE, PAGE), (BASE + 4 * PAGE, 2 * PAGE))
        gadget.dma.write(BASE, bytes(8 * PAGE))
        assert self.report(client, BASE, 0x20 * PAGE) == 0b110010

    def test_a_report_of_everything_costs_no_more_than_what_is_logged(
        self, gadget: Gadget, logging: LocalClient
    ) -> None:
        gadget.dma.write(BASE, b"x")
        assert self.report(logging, 0, (1 << 64) - PAGE, 1 << 58) == 1
        assert self.report(logging, BASE, PAGE) == 0

    def test_the_page_size_is_the_devices_choice(self, client: LocalClient) -> None:
        reply = self.start(client, 2 << 20)
        assert LoggingControl.parse(reply[8:24]).page_size == PAGE

    def test_starting_twice_keeps_what_is_logged(
        self, gadget: Gadget, logging: LocalClient
    ) -> None:
        gadget.dma.write(BASE, b"x")
        self.start(logging)
        assert self.report(logging, BASE, PAGE) == 1

    def test_stopping(self, gadget: Gadget, logging: LocalClient) -> None:
        gadget.dma.write(BASE, b"x")
        for data in (b"", LoggingControl(page_size=PAGE, num_ranges=0, reserved=0).build()):
            head = DeviceFeature(argsz=8 + len(data), flags=self.STOP).build()
            logging.call(Command.DEVICE_FEATURE, head + data)
        self.report(logging, BASE, PAGE, expect=errno.EINVAL)
        assert gadget.log.count(("logging", False)) == 1

    def test_it_ends_with_the_client_and_with_a_reset(self, gadget: Gadget) -> None:
        for end in ("reset", "close"):
            client = LocalClient(gadget)
            client.negotiate()
            self.start(client)
            if end == "reset":
                client.call(Command.DEVICE_RESET)
                assert not gadget.dma.log.active
            client.close()
            assert not gadget.dma.log.active

    def test_bad_requests(self, logging: LocalClient) -> None:
        bad = errno.EINVAL
        self.start(logging, 0, expect=bad)
        self.start(logging, 3000, expect=bad)
        self.start(logging, PAGE, (0, 0), expect=bad)
        self.start(logging, PAGE, (PAGE, 2**64 - 1), expect=bad)
        self.report(logging, BASE + 1, PAGE, expect=bad)
        self.report(logging, BASE, 0, expect=bad)
        self.report(logging, BASE, PAGE, 3000, expect=bad)
        self.report(logging, BASE, PAGE, 0, expect=bad)
        self.report(logging, 2**64 - PAGE, 2 * PAGE, expect=bad)
        control = LoggingControl(page_size=PAGE, num_ranges=2, reserved=0).build()
        head = DeviceFeature(argsz=64, flags=self.START).build()
        logging.call(Command.DEVICE_FEATURE, head + control + bytes(16), expect=bad)
        huge = LoggingReport(iova=0, length=2**48, page_size=PAGE).build()
        head = DeviceFeature(argsz=0xFFFFFFFF, flags=self.REPORT).build()
        logging.call(Command.DEVICE_FEATURE, head + huge, expect=bad)

    def test_no_room_for_the_bitmap(self, logging: LocalClient) -> None:
        report = LoggingReport(iova=BASE, length=PAGE, page_size=PAGE).build()
        head = DeviceFeature(argsz=39, flags=self.REPORT).build()
        logging.call(Command.DEVICE_FEATURE, head + report, expect=errno.EINVAL)

    @given(
        st.lists(st.tuples(st.integers(0, 1 << 18), st.integers(1, 1 << 14)), max_size=10),
        st.integers(0, 40),
        st.integers(1, 60),
        st.sampled_from([512, 4096, 8192, 65536]),
    )
    @settings(max_examples=80, deadline=None)
    def test_against_a_set_of_pages(
        self, writes: list[tuple[int, int]], first: int, pages: int, page_size: int
    ) -> None:
        log, base = DmaLog(), (1 << 27) - (1 << 17)  # across a border of the log's own chunks
        log.start(PAGE, [])
        dirty = set()
        for addr, size in writes:
            log.mark(base + addr, size)
            dirty |= set(range((base + addr) // PAGE, -(-(base + addr + size) // PAGE)))
        iova, length = base + first * PAGE, pages * PAGE
        bitmap = int.from_bytes(log.report(iova, length, page_size, 1 << 20), "little")
        for bit in range(-(-length // page_size)):
            low, high = iova + bit * page_size, min(iova + (bit + 1) * page_size, iova + length)
            wanted = any(p in dirty for p in range(low // PAGE, -(-high // PAGE)))
            assert bool(bitmap >> bit & 1) == wanted
        assert bitmap >> -(-length // page_size) == 0
