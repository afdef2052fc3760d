# SPDX-License-Identifier: Apache-2.0
"""``vfio_user.dma``, ``dirty``, ``remote``: client memory, mapped, by message, and logged.

vfio-user specification (QEMU 11.1), ``VFIO_USER_DMA_MAP``, ``_UNMAP``, ``_READ``, ``_WRITE`` and
``VFIO_DEVICE_FEATURE_DMA_LOGGING_START`` to ``_REPORT``.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from gadget import Gadget
from helpers import open_fds
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_user import DmaError, DmaRegion, RequestError, SessionLimits
from vfio_user.errors import VfioUserError
from vfio_user.remote import Layout
from vfio_user.testing import LocalClient, Ram, message
from virtio_formats.vfio_user import (
    Command,
    DeviceFeature,
    DeviceState,
    DmaMap,
    DmaUnmap,
    Feature,
    FeatureFlags,
    MigState,
    RegionAccess,
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


def dma_map(client: LocalClient, address: int, size: int, expect: int = 0, **fields: int) -> None:
    values = {"argsz": 32, "flags": 3, "offset": 0, "address": address, "size": size, **fields}
    client.call(Command.DMA_MAP, DmaMap(**values).build(), expect=expect)


class TestMap:
    def test_with_a_descriptor(self, gadget: Gadget, client: LocalClient) -> None:
        ram = Ram(BASE, 4 * PAGE)
        client.map(ram)
        assert gadget.log[-1] == ("map", BASE, 4 * PAGE)
        ram.write(BASE + 10, b"hello")
        assert gadget.dma.read(BASE + 10, 5) == b"hello"
        gadget.dma.write(BASE + PAGE, b"back")
        assert ram.read(BASE + PAGE, 4) == b"back"
        assert client.dma_sizes == []

    def test_from_an_offset_of_the_file(self, gadget: Gadget, client: LocalClient) -> None:
        ram = Ram(BASE, 4 * PAGE)
        ram.write(BASE + 2 * PAGE, b"third")
        client.map(ram, offset=2 * PAGE)
        assert gadget.dma.read(BASE, 5) == b"third"

    def test_nothing_is_mapped_before_it_is_touched(
        self, gadget: Gadget, client: LocalClient
    ) -> None:
        client.map(Ram(BASE, PAGE))
        assert gadget.dma.regions[0]._view is None

    def test_over_an_existing_region(self, client: LocalClient) -> None:
        dma_map(client, 4 * PAGE, 4 * PAGE)
        for address, size in ((4, 4), (3, 2), (7, 2), (5, 1), (3, 9)):
            dma_map(client, address * PAGE, size * PAGE, expect=errno.EEXIST)
        dma_map(client, 3 * PAGE, PAGE)
        dma_map(client, 8 * PAGE, PAGE)

    @pytest.mark.parametrize(
        "fields",
        [
            {"address": BASE + 1, "size": PAGE},
            {"address": BASE, "size": PAGE + 1},
            {"address": BASE, "size": 0},
            {"address": BASE, "size": PAGE, "argsz": 31},
            {"address": BASE, "size": PAGE, "flags": 0},
            {"address": BASE, "size": PAGE, "flags": 7},
        ],
    )
    def test_malformed(self, client: LocalClient, fields: dict[str, int]) -> None:
        dma_map(client, expect=errno.EINVAL, **fields)

    @pytest.mark.parametrize(
        ("address", "size"),
        [
            (2**64 - PAGE, PAGE),
            (2**64 - PAGE, 2 * PAGE),
            (PAGE, 2**64 - PAGE),
            (0, 2**64 - PAGE + PAGE * 0),
        ],
    )
    def test_past_the_end_of_the_address_space(
        self, client: LocalClient, address: int, size: int
    ) -> None:
        expect = errno.ENOSPC if address + size > 2**64 - PAGE else 0
        dma_map(client, address, size, expect=expect)

    def test_too_many(self, gadget: Gadget) -> None:
        client = LocalClient(gadget, limits=SessionLimits(max_dma_maps=2))
        client.negotiate()
        dma_map(client, 0, PAGE)
        dma_map(client, PAGE, PAGE)
        dma_map(client, 2 * PAGE, PAGE, expect=errno.EINVAL)
        client.close()

    @pytest.mark.parametrize(("offset", "size"), [(0, 5), (4, 1), (1, 4), (2**51, 1)])
    def test_outside_of_the_file(self, client: LocalClient, offset: int, size: int) -> None:
        """A mapping past the end of its file would be a SIGBUS later."""
        ram = Ram(BASE, 4 * PAGE)
        before = open_fds()
        request = DmaMap(argsz=32, flags=3, offset=offset * PAGE, address=BASE, size=size * PAGE)
        client.call(Command.DMA_MAP, request.build(), [ram.fd], expect=errno.EINVAL)
        assert open_fds() == before
        ram.close()

    def test_an_unaligned_offset(self, client: LocalClient) -> None:
        ram = Ram(BASE, 4 * PAGE)
        request = DmaMap(argsz=32, flags=3, offset=100, address=BASE, size=PAGE)
        client.call(Command.DMA_MAP, request.build(), [ram.fd], expect=errno.EINVAL)
        ram.close()

    def test_a_descriptor_that_is_no_file(self, client: LocalClient) -> None:
        ours, theirs = os.pipe()
        request = DmaMap(argsz=32, flags=3, offset=0, address=BASE, size=PAGE)
        client.call(Command.DMA_MAP, request.build(), [ours], expect=errno.EINVAL)
        os.close(ours)
        os.close(theirs)

    def test_a_device_that_refuses(self, gadget: Gadget, client: LocalClient) -> None:
        def refuse(what: str) -> None:
            raise RequestError(errno.EPERM, what)

        gadget.refuse = refuse
        ram = Ram(BASE, PAGE)
        client.map(ram, expect=errno.EPERM)
        assert gadget.dma.regions == []
        ram.close()


class TestUnmap:
    def test_exactly_one(self, gadget: Gadget, client: LocalClient) -> None:
        client.map(Ram(BASE, PAGE))
        dma_map(client, BASE + PAGE, PAGE)
        client.unmap(BASE, PAGE)
        assert [r.address for r in gadget.dma.regions] == [BASE + PAGE]
        assert gadget.log[-1] == ("unmap", BASE, PAGE)
        with pytest.raises(DmaError):
            gadget.dma.read(BASE, 1)

    @pytest.mark.parametrize(
        ("address", "size"),
        [(BASE + PAGE, 3 * PAGE), (BASE, PAGE), (BASE, 5 * PAGE), (0, PAGE), (2**64 - 1, 1)],
    )
    def test_must_match_a_mapping(self, client: LocalClient, address: int, size: int) -> None:
        dma_map(client, BASE, 4 * PAGE)
        client.unmap(address, size, expect=errno.ENOENT)
        client.unmap(BASE, 4 * PAGE)

    def test_all(self, gadget: Gadget, client: LocalClient) -> None:
        for number in range(5):
            dma_map(client, number * 2 * PAGE, PAGE)
        client.unmap(0, 0, flags=2)
        assert gadget.dma.regions == []

    def test_bad_requests(self, client: LocalClient) -> None:
        dma_map(client, BASE, PAGE)
        client.unmap(BASE, PAGE, flags=2, expect=errno.EINVAL)
        client.unmap(BASE, PAGE, flags=1, expect=errno.EINVAL)
        client.unmap(BASE, PAGE, flags=3, expect=errno.EINVAL)
        client.unmap(BASE, PAGE, flags=4, expect=errno.EINVAL)
        for argsz in (8, (1 << 20) + 8):
            request = DmaUnmap(argsz=argsz, flags=0, address=BASE, size=PAGE)
            client.call(Command.DMA_UNMAP, request.build(), expect=errno.EINVAL)
        client.call(Command.DMA_UNMAP, bytes(8), expect=errno.EINVAL)
        client.unmap(BASE, PAGE)

    def test_a_view_that_is_still_held_stays_readable(
        self, gadget: Gadget, client: LocalClient
    ) -> None:
        ram = Ram(BASE, PAGE)
        client.map(ram)
        view = gadget.dma.regions[0].view
        client.unmap(BASE, PAGE)
        ram.write(BASE, b"late")
        assert view is not None
        assert bytes(view[:4]) == b"late"


class TestLookup:
    def test_vectorised(self, gadget: Gadget, client: LocalClient) -> None:
        dma_map(client, 0, 2 * PAGE)
        dma_map(client, 2 * PAGE, PAGE)
        rows = [
            (0, 0, True),
            (0, 2 * PAGE, True),
            (0, 2 * PAGE + 1, False),
            (2 * PAGE, PAGE, True),
            (PAGE, 2 * PAGE, False),  # in two regions
            (3 * PAGE, 1, False),
            (PAGE, 2**64 - 1, False),
            (2**64 - 1, 2, False),
        ]
        found = gadget.dma.contains(
            np.array([r[0] for r in rows], np.uint64), np.array([r[1] for r in rows], np.uint64)
        )
        assert found.tolist() == [r[2] for r in rows]

    def test_adjacent_regions_are_joined(self, gadget: Gadget, client: LocalClient) -> None:
        client.map(Ram(BASE, PAGE))
        client.map(Ram(BASE + PAGE, PAGE), mapped=False)
        gadget.dma.write(BASE + PAGE - 3, b"across")
        assert gadget.dma.read(BASE + PAGE - 3, 6) == b"across"
        with pytest.raises(DmaError):
            gadget.dma.read(BASE + 2 * PAGE - 3, 6)

    def test_permissions(self, gadget: Gadget, client: LocalClient) -> None:
        client.map(Ram(0, PAGE), flags=1)
        client.map(Ram(PAGE, PAGE), flags=2)
        assert gadget.dma.read(0, 4) == bytes(4)
        gadget.dma.write(PAGE, b"x")
        with pytest.raises(DmaError):
            gadget.dma.write(PAGE - 1, b"xy")
        with pytest.raises(DmaError):
            gadget.dma.read(PAGE, 1)

    @given(st.lists(st.tuples(st.booleans(), st.integers(0, 15), st.integers(1, 6)), max_size=20))
    @settings(max_examples=60, deadline=None)
    def test_the_table_never_overlaps(self, steps: list[tuple[bool, int, int]]) -> None:
        device = Gadget()
        table, owner = device.dma, [-1] * 32
        for mapping, page, count in steps:
            pages = range(page, page + count)
            free = all(owner[p] < 0 for p in pages)
            exact = owner.count(page) == count and owner[page] == page
            span = {"address": page * PAGE, "size": count * PAGE}
            if mapping:
                mine, refusal, ok = page, errno.EEXIST, free
                request = DmaMap(argsz=32, flags=3, offset=0, **span)
                act: partial[Any] = partial(table.map, request, None, limit=99)
            else:
                mine, refusal, ok = -1, errno.ENOENT, exact
                act = partial(table.unmap, DmaUnmap(argsz=24, flags=0, **span))
            if ok:
                act()
                owner[page : page + count] = [mine] * count
            else:
                with pytest.raises(RequestError) as caught:
                    act()
                assert caught.value.errno == refusal
        assert [r.address // PAGE for r in table.regions] == sorted({o for o in owner if o >= 0})
        device.close()


class TestMessages:
    """Memory that came without a descriptor: DMA_READ and DMA_WRITE, in both layouts."""

    @pytest.fixture(params=[False, True], ids=["count64", "count32"])
    def remote(self, request: pytest.FixtureRequest, gadget: Gadget) -> Iterator[LocalClient]:
        client = LocalClient(gadget, narrow=request.param)
        client.negotiate()
        client.map(Ram(BASE, 0x100000), mapped=False)
        yield client
        client.close()
        client.ram[0].close()

    def test_read(self, gadget: Gadget, remote: LocalClient) -> None:
        remote.ram[0].write(BASE, bytes(range(1, 200)))
        assert gadget.dma.read(BASE, 199) == bytes(range(1, 200))

    def test_write(self, gadget: Gadget, remote: LocalClient) -> None:
        gadget.dma.write(BASE + 3, b"from the device")
        assert remote.ram[0].read(BASE, 24) == b"\0\0\0from the device\0\0\0\0\0\0"

    @pytest.mark.parametrize("lead", range(10))
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9])
    def test_the_layout_shows_in_the_first_data(
        self, gadget: Gadget, remote: LocalClient, lead: int, size: int
    ) -> None:
        """Zeroes tell nothing; the first byte that is not zero settles it, wherever it is."""
        expected = bytes(lead) + b"\xa5" + bytes(9)
        remote.ram[0].write(BASE, expected)
        assert gadget.dma.read(BASE, size) == expected[:size]
        known = remote.session.requests.layout
        if lead < size:
            assert known is (Layout.NARROW if remote.narrow else Layout.WIDE)
        else:
            assert known is Layout.UNKNOWN
        assert gadget.dma.read(BASE, 20) == expected.ljust(20, b"\0")

    @given(st.lists(st.tuples(st.integers(0, 40), st.binary(max_size=24)), max_size=8))
    @settings(max_examples=60, deadline=None)
    def test_writes_and_reads_in_either_layout(self, steps: list[tuple[int, bytes]]) -> None:
        for narrow in (False, True):
            device = Gadget()
            client = LocalClient(device, narrow=narrow)
            client.negotiate()
            ram = Ram(0, PAGE)
            client.map(ram, mapped=False)
            model = bytearray(64)
            for offset, data in steps:
                device.dma.write(offset, data)
                model[offset : offset + len(data)] = data
                assert ram.read(0, 64) == model[:64]
                assert device.dma.read(0, 64) == model[:64]
            client.close()
            ram.close()
            device.close()

    def test_split_by_what_the_client_takes(self, gadget: Gadget) -> None:
        client = LocalClient(gadget)
        client.negotiate(b'{"capabilities":{"max_data_xfer_size":4096}}' + b" " * 99 + b"\0")
        client.map(Ram(BASE, 4 * PAGE), mapped=False)
        data = os.urandom(2 * PAGE + 42)
        client.session.requests.layout = Layout.WIDE
        gadget.dma.write(BASE + 7, data)
        assert client.dma_sizes == [PAGE, PAGE, 42]
        assert gadget.dma.read(BASE + 7, len(data)) == data
        client.close()
        client.ram[0].close()

    def test_a_client_that_takes_nothing(self, gadget: Gadget) -> None:
        client = LocalClient(gadget)
        client.negotiate(b'{"capabilities":{"max_data_xfer_size":0}}' + b" " * 99 + b"\0")
        dma_map(client, BASE, PAGE)
        with pytest.raises(DmaError):
            gadget.dma.read(BASE, 1)
        client.close()

    def test_refused(self, gadget: Gadget, remote: LocalClient) -> None:
        remote.dma_error = errno.EIO
        for access in (lambda: gadget.dma.read(BASE, 4), lambda: gadget.dma.write(BASE, b"x")):
            with pytest.raises(DmaError) as caught:
                access()
            assert caught.value.errno == errno.EIO

    def test_no_answer_and_a_late_one(self, gadget: Gadget, remote: LocalClient) -> None:
        remote.silent = True
        with pytest.raises(DmaError) as caught:
            gadget.dma.read(BASE, 4)
        assert caught.value.errno == errno.ETIMEDOUT
        remote.inbox.clear()
        remote.send(message(Command.DMA_READ, bytes(20), msg_id=1, flags=1))
        assert remote.inbox == [], "a late answer is no error"
        remote.silent = False
        assert gadget.dma.read(BASE, 4) == bytes(4)

    @pytest.mark.parametrize(
        ("command", "payload"),
        [
            (Command.DMA_READ, b""),
            (Command.DMA_READ, bytes(19)),
            (Command.DMA_READ, bytes(21)),
            (Command.DMA_READ, bytes(20)),  # another address
            (Command.DMA_WRITE, bytes(20)),
        ],
    )
    def test_answers_that_do_not_fit(
        self, gadget: Gadget, client: LocalClient, command: int, payload: bytes
    ) -> None:
        dma_map(client, BASE, PAGE)
        client.silent = True
        client.before_dma = lambda: client.session.feed(
            message(command, payload, msg_id=1, flags=1)
        )
        with pytest.raises(DmaError) as caught:
            gadget.dma.read(BASE, 4)
        assert caught.value.errno == errno.EPROTO

    def test_nobody_there(self, gadget: Gadget, remote: LocalClient) -> None:
        remote.close()
        with pytest.raises(DmaError):
            gadget.dma.read(BASE, 4)

    def test_over_the_twin_socket(self, gadget: Gadget) -> None:
        client = LocalClient(gadget, twin=True)
        wanted = b'{"capabilities":{"twin_socket":{"supported":true}}}' + b" " * 99 + b"\0"
        reply = client.call(Command.VERSION, bytes(4) + wanted)
        os.close(reply.fds[0])
        client.map(Ram(BASE, PAGE), mapped=False)
        gadget.dma.write(BASE, b"twin")
        assert gadget.dma.read(BASE, 4) == b"twin"
        assert client.session.take_output() == []
        client.session.feed_twin(message(Command.DMA_READ))
        assert not client.session.is_open, "a command on the socket for replies"
        client.close()
        client.ram[0].close()


class TestWhileTheDeviceWaits:
    """Commands that arrive in the middle of the device's own DMA."""

    @pytest.fixture
    def waiting(self, gadget: Gadget) -> Iterator[LocalClient]:
        client = LocalClient(gadget)
        client.negotiate()
        client.map(Ram(BASE, PAGE), mapped=False)
        client.ram[0].write(BASE, b"data")
        yield client
        client.close()
        client.ram[0].close()

    def meanwhile(self, client: LocalClient, data: bytes) -> None:
        client.before_dma = lambda: (
            setattr(client, "before_dma", None),
            client.session.feed(data),
        )[0]

    def test_register_accesses_are_served(self, gadget: Gadget, waiting: LocalClient) -> None:
        request = RegionAccess(offset=8, region=0, count=4).build()
        self.meanwhile(
            waiting,
            message(Command.REGION_WRITE, request + b"abcd", msg_id=5)
            + message(Command.REGION_READ, request, msg_id=6),
        )
        seen: list[bytes] = []
        gadget.defer(lambda: seen.append(gadget.dma.read(BASE, 4)))
        waiting.run()
        assert seen == [b"data"]
        assert [(r.id, r.payload[16:]) for r in waiting.inbox] == [(5, b""), (6, b"abcd")]

    def test_not_while_a_command_is_being_served(
        self, gadget: Gadget, waiting: LocalClient
    ) -> None:
        """The command's own effects come first; it is answered first, too."""
        order: list[str] = []

        def poke(offset: int, data: bytes) -> None:
            order.append(f"begin {data.decode()}")
            gadget.dma.read(BASE, 4)
            order.append(f"end {data.decode()}")

        gadget.regions[0].write = poke
        request = RegionAccess(offset=8, region=0, count=1).build()
        self.meanwhile(waiting, message(Command.REGION_WRITE, request + b"2", msg_id=2))
        waiting.send(message(Command.REGION_WRITE, request + b"1", msg_id=1))
        assert order == ["begin 1", "end 1", "begin 2", "end 2"]
        assert [r.id for r in waiting.inbox] == [1, 2]

    def test_a_reset_ends_the_wait(self, gadget: Gadget, waiting: LocalClient) -> None:
        waiting.silent = True
        self.meanwhile(waiting, message(Command.DEVICE_RESET, msg_id=9))
        failed: list[int] = []

        def work() -> None:
            try:
                gadget.dma.read(BASE, 4)
            except DmaError as error:
                failed.append(error.errno)
                assert ("reset",) not in gadget.log, "reset in the middle of the work"

        gadget.defer(work)
        waiting.run()
        assert failed == [errno.ECANCELED]
        assert gadget.log[-1] == ("reset",)
        assert [(r.id, r.error) for r in waiting.inbox] == [(9, 0)]

    @pytest.mark.parametrize(
        ("flags", "data"),
        [
            (FeatureFlags.GET | Feature.MIG_DEVICE_STATE, b""),
            (FeatureFlags.GET | Feature.MIGRATION, b""),
            (FeatureFlags.PROBE | FeatureFlags.SET | Feature.MIG_DEVICE_STATE, b""),
            (FeatureFlags.GET | Feature.DMA_LOGGING_REPORT, struct.pack("=QQQ", BASE, PAGE, PAGE)),
        ],
    )
    def test_a_question_disturbs_nothing(
        self, gadget: Gadget, waiting: LocalClient, flags: int, data: bytes
    ) -> None:
        """A client that only asks failed the device's DMA, which stopped a virtqueue for good."""
        gadget.dma.log.start(PAGE, ())
        request = DeviceFeature(argsz=64, flags=flags).build() + data
        self.meanwhile(waiting, message(Command.DEVICE_FEATURE, request, msg_id=9))
        seen: list[bytes] = []
        gadget.defer(lambda: seen.append(gadget.dma.read(BASE, 4)))
        waiting.run()
        assert seen == [b"data"]
        assert [(r.id, r.error) for r in waiting.inbox] == [(9, 0)]

    def test_a_question_is_answered_before_the_work_has_ended(
        self, gadget: Gadget, waiting: LocalClient
    ) -> None:
        """Served like a register access: it neither waits for the work nor cancels it."""
        waiting.silent = True
        flags = FeatureFlags.GET | Feature.MIG_DEVICE_STATE
        request = DeviceFeature(argsz=64, flags=flags).build()
        self.meanwhile(waiting, message(Command.DEVICE_FEATURE, request, msg_id=9))
        failed: list[int] = []

        def work() -> None:
            try:
                gadget.dma.read(BASE, 4)
            except DmaError as error:
                failed.append(error.errno)

        gadget.defer(work)
        waiting.run()
        assert failed == [errno.ETIMEDOUT], "ECANCELED: it was taken for a command that changes"
        assert [(r.id, r.error) for r in waiting.inbox] == [(9, 0)]

    def stop(self) -> bytes:
        request = DeviceFeature(argsz=16, flags=FeatureFlags.SET | Feature.MIG_DEVICE_STATE)
        state = MigState(device_state=DeviceState.STOP, data_fd=0)
        return message(Command.DEVICE_FEATURE, request.build() + state.build(), msg_id=9)

    def test_a_change_of_state_waits_for_the_work(
        self, gadget: Gadget, waiting: LocalClient
    ) -> None:
        """All of it: not only for the message that is under way."""
        self.meanwhile(waiting, self.stop())
        seen: list[bytes] = []

        def work() -> None:
            seen.append(gadget.dma.read(BASE, 2))
            seen.append(gadget.dma.read(BASE + 2, 2))
            assert ("running", False) not in gadget.log

        gadget.defer(work)
        waiting.run()
        assert seen == [b"da", b"ta"]
        assert gadget.log[-1] == ("running", False)
        assert [(r.id, r.error) for r in waiting.inbox] == [(9, 0)]

    def test_but_not_for_a_client_that_cannot_answer(
        self, gadget: Gadget, waiting: LocalClient
    ) -> None:
        waiting.silent = True
        self.meanwhile(waiting, self.stop())
        failed: list[int] = []

        def work() -> None:
            try:
                gadget.dma.read(BASE, 4)
            except DmaError as error:
                failed.append(error.errno)

        gadget.defer(work)
        waiting.run()
        assert failed == [errno.ECANCELED]
        assert [(r.id, r.error) for r in waiting.inbox] == [(9, 0)]

    def test_the_client_goes(self, gadget: Gadget, waiting: LocalClient) -> None:
        waiting.silent = True
        waiting.before_dma = waiting.session.receive_eof
        with pytest.raises(DmaError) as caught:
            gadget.dma.read(BASE, 4)
        assert caught.value.errno == errno.ENOTCONN

    def test_deferred_work_that_fails_harms_nobody(
        self, gadget: Gadget, waiting: LocalClient
    ) -> None:
        gadget.defer(lambda: print(1 // 0))
        gadget.defer(lambda: gadget.log.append(("next",)))
        waiting.run()
        assert gadget.log[-1] == ("next",)


def test_every_error_of_this_package_is_one_family() -> None:
    assert issubclass(DmaError, VfioUserError)
    assert issubclass(RequestError, VfioUserError)


class TestClientsOfOtherVersions:
    def test_flags_of_newer_clients(self, gadget: Gadget, client: LocalClient) -> None:
        """Bits 2 and 3 of memory that comes with a descriptor; they were refused."""
        client.map(Ram(BASE, PAGE), flags=0b1111)
        assert gadget.dma.regions[0].window().flags == 3
        ram = Ram(BASE + 0x10000, PAGE)
        client.map(ram, flags=0b0111, mapped=False, expect=errno.EINVAL)
        client.map(ram, flags=0b1100, expect=errno.EINVAL)
        client.map(ram, flags=0b10011, expect=errno.EINVAL)
        ram.close()

    def test_a_character_device_is_mapped(self, gadget: Gadget, client: LocalClient) -> None:
        """As /dev/dax is, whose size fstat does not tell."""
        fd = os.open("/dev/zero", os.O_RDWR)
        request = DmaMap(argsz=32, flags=3, offset=0, address=BASE, size=PAGE).build()
        client.call(Command.DMA_MAP, request, [fd])
        gadget.dma.write(BASE, b"there")
        assert gadget.dma.read(BASE, 5) == b"there"
        assert client.session.requests.sent == 0
        os.close(fd)

    def test_one_that_cannot_be_mapped_is_reached_by_messages(
        self, gadget: Gadget, client: LocalClient
    ) -> None:
        ram = Ram(BASE, PAGE)
        ram.write(BASE, b"data")
        before = open_fds()
        fd = os.open("/dev/null", os.O_RDWR)
        request = DmaMap(argsz=32, flags=3, offset=0, address=BASE, size=PAGE).build()
        client.call(Command.DMA_MAP, request, [fd])
        os.close(fd)
        client.ram.append(ram)
        assert gadget.dma.read(BASE, 4) == b"data"
        assert open_fds() == before

    def test_memory_that_the_device_may_only_write(
        self, gadget: Gadget, client: LocalClient
    ) -> None:
        """Which of two layouts the client uses was asked by a read, which it refuses."""
        ram = Ram(BASE, PAGE)
        client.map(ram, flags=2, mapped=False)
        client.refuse_reads = True
        gadget.dma.write(BASE, b"data")
        assert ram.read(BASE, 4) == b"data"


def test_a_hook_that_fails_leaves_no_region(gadget: Gadget, client: LocalClient) -> None:
    for number in range(3):
        client.map(Ram(BASE + number * 0x10000, PAGE))

    def fail(region: DmaRegion) -> None:
        raise ZeroDivisionError

    gadget.dma.on_unmap = fail
    client.unmap(0, 0, flags=2, expect=errno.EIO)
    assert gadget.dma.regions == []
    gadget.dma.on_unmap = None
