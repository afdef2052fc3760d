# SPDX-License-Identifier: Apache-2.0
"""``vfio_user.irqs``: GET_IRQ_INFO and SET_IRQS, edges, levels, masks.

vfio-user specification (QEMU 11.1), ``VFIO_USER_DEVICE_GET_IRQ_INFO``, ``_SET_IRQS``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest
from gadget import Gadget
from helpers import open_fds

from vfio_user import IrqTable, UsageError
from vfio_user.testing import LocalClient, events
from virtio_formats.vfio_user import Command, IrqInfo, IrqInfoFlags, IrqSet, IrqSetFlags, PciIrq

NONE, BOOL, EVENTFD = IrqSetFlags.DATA_NONE, IrqSetFlags.DATA_BOOL, IrqSetFlags.DATA_EVENTFD
MASK, UNMASK = IrqSetFlags.ACTION_MASK, IrqSetFlags.ACTION_UNMASK
TRIGGER = IrqSetFlags.ACTION_TRIGGER
INTX, MSI, MSIX, ERR, REQ = PciIrq


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
    assert open_fds() == open_before, "descriptors leaked"


@pytest.fixture
def fds() -> Iterator[list[int]]:
    made = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
    yield made
    for fd in made:
        os.close(fd)


class TestGetIrqInfo:
    def ask(self, client: LocalClient, index: int, argsz: int = 16, expect: int = 0) -> IrqInfo:
        request = IrqInfo(argsz=argsz, flags=0, index=index, count=0)
        reply = client.call(Command.DEVICE_GET_IRQ_INFO, request.build(), expect=expect)
        return request if expect else IrqInfo.parse(reply.payload)

    @pytest.mark.parametrize(
        ("index", "count", "flags"),
        [
            (INTX, 1, IrqInfoFlags.EVENTFD | IrqInfoFlags.MASKABLE | IrqInfoFlags.AUTOMASKED),
            (MSI, 0, IrqInfoFlags.EVENTFD | IrqInfoFlags.MASKABLE),
            (MSIX, 2048, IrqInfoFlags.EVENTFD | IrqInfoFlags.MASKABLE),
            (ERR, 1, IrqInfoFlags.EVENTFD),
            (REQ, 1, IrqInfoFlags.EVENTFD),
        ],
    )
    def test_each_index(
        self, client: LocalClient, index: PciIrq, count: int, flags: IrqInfoFlags
    ) -> None:
        for argsz in (16, 32):
            info = self.ask(client, index, argsz)
            assert (info.argsz, info.index, info.count, info.flags) == (16, index, count, flags)

    def test_bad_requests(self, client: LocalClient) -> None:
        self.ask(client, INTX, argsz=8, expect=errno.EINVAL)
        self.ask(client, 5, expect=errno.EINVAL)
        client.call(Command.DEVICE_GET_IRQ_INFO, bytes(8), expect=errno.EINVAL)


class TestBadSetIrqs:
    @pytest.mark.parametrize(
        "request_fields",
        [
            {"index": 5, "flags": TRIGGER | NONE, "count": 0},
            {"index": MSIX, "flags": TRIGGER | NONE, "count": 1, "argsz": 3},
            {"index": MSIX, "flags": TRIGGER | NONE, "count": 1, "argsz": 21},
            {"index": MSIX, "flags": MASK | UNMASK, "count": 0},
            {"index": MSIX, "flags": MASK | UNMASK | NONE, "count": 1},
            {"index": MSIX, "flags": MASK | NONE | BOOL, "count": 0},
            {"index": MSIX, "flags": NONE, "count": 1},
            {"index": MSIX, "flags": TRIGGER, "count": 1},
            {"index": MSIX, "flags": TRIGGER | NONE | 0x40, "count": 1},
            {"index": MSIX, "flags": MASK | NONE, "start": 2047, "count": 2},
            {"index": MSIX, "flags": MASK | NONE, "start": 2049, "count": 1},
            {"index": MSIX, "flags": TRIGGER | EVENTFD, "start": 284, "count": 0xFFFFFFFF},
            {"index": MSIX, "flags": TRIGGER | NONE, "start": 0xFFFFFFFF, "count": 0xFFFFFFFF},
            {"index": ERR, "flags": MASK | NONE, "count": 1},
            {"index": REQ, "flags": UNMASK | NONE, "count": 1},
            {"index": ERR, "flags": TRIGGER | NONE, "start": 0, "count": 2},
            {"index": REQ, "flags": TRIGGER | NONE, "start": 1, "count": 1},
            {"index": MSIX, "flags": TRIGGER | NONE, "start": 1, "count": 0},
            {"index": MSIX, "flags": MASK | NONE, "count": 0},
            {"index": MSIX, "flags": TRIGGER | BOOL, "count": 0},
            {"index": MSIX, "flags": TRIGGER | EVENTFD, "count": 0},
            {"index": MSIX, "flags": TRIGGER | BOOL, "count": 2, "data": b"\0"},
            {"index": MSIX, "flags": TRIGGER | BOOL, "count": 2, "data": b"\0\0\0"},
            {"index": MSIX, "flags": TRIGGER | NONE, "count": 1, "data": b"\0"},
            {"index": MSI, "flags": TRIGGER | NONE, "count": 1},
        ],
    )
    def test_refused(self, client: LocalClient, request_fields: dict[str, int]) -> None:
        client.set_irqs(expect=errno.EINVAL, **request_fields)  # type: ignore[arg-type]

    def test_short(self, client: LocalClient) -> None:
        client.call(Command.DEVICE_SET_IRQS, b"", expect=errno.EINVAL)
        client.call(Command.DEVICE_SET_IRQS, bytes(8), expect=errno.EINVAL)

    def test_descriptors_that_do_not_fit(self, client: LocalClient, fds: list[int]) -> None:
        before = open_fds()
        for flags, count, data in (
            (TRIGGER | BOOL, 1, b"\0"),
            (TRIGGER | NONE, 1, b""),
            (TRIGGER | EVENTFD, 2, b""),
            (TRIGGER | EVENTFD, 0, b""),
        ):
            client.set_irqs(MSIX, flags, count=count, data=data, fds=fds[:1], expect=errno.EINVAL)
        client.set_irqs(INTX, MASK | EVENTFD, count=1, fds=fds[:1], expect=errno.EINVAL)
        assert open_fds() == before

    def test_something_else_than_an_eventfd(self, client: LocalClient, fds: list[int]) -> None:
        """Eight bytes written to any other file would be damage."""
        file = os.memfd_create("precious")
        flags = TRIGGER | EVENTFD
        client.set_irqs(MSIX, flags, count=2, fds=[fds[0], file], expect=errno.EINVAL)
        client.set_irqs(MSIX, TRIGGER | NONE, count=2)
        assert os.fstat(file).st_size == 0
        assert events(fds[0]) == 0, "half of a refused request was carried out"
        os.close(file)


class TestEdges:
    def test_trigger(self, gadget: Gadget, client: LocalClient, fds: list[int]) -> None:
        client.assign(MSIX, fds[:2], start=7)
        assert gadget.irqs.trigger(MSIX, 8)
        assert [events(fd) for fd in fds] == [0, 1, 0]

    def test_the_client_can_trigger(self, client: LocalClient, fds: list[int]) -> None:
        client.assign(MSIX, fds[:2])
        client.set_irqs(MSIX, TRIGGER | NONE, start=1, count=1)
        assert [events(fd) for fd in fds[:2]] == [0, 1]
        client.set_irqs(MSIX, TRIGGER | BOOL, count=2, data=b"\1\0")
        assert [events(fd) for fd in fds[:2]] == [1, 0]

    def test_replacing_and_taking_away(
        self, gadget: Gadget, client: LocalClient, fds: list[int]
    ) -> None:
        before = open_fds()
        client.assign(MSIX, fds[:1])
        client.assign(MSIX, fds[1:2])
        assert open_fds() == before + 1
        gadget.irqs.trigger(MSIX)
        assert [events(fd) for fd in fds[:2]] == [0, 1]
        client.set_irqs(MSIX, TRIGGER | EVENTFD, count=1)
        assert open_fds() == before
        assert not gadget.irqs.trigger(MSIX)

    def test_an_edge_without_an_eventfd_waits_for_one(
        self, gadget: Gadget, client: LocalClient, fds: list[int]
    ) -> None:
        """QEMU takes all vectors away to enable one more."""
        client.assign(MSIX, fds[:1])
        client.set_irqs(MSIX, TRIGGER | NONE, count=0)
        assert not gadget.irqs.trigger(MSIX, 0)
        assert gadget.irqs.pending(MSIX)[:2] == [True, False]
        client.assign(MSIX, fds[:2])
        assert [events(fd) for fd in fds[:2]] == [1, 0]
        assert not any(gadget.irqs.pending(MSIX))

    def test_masked_edges_are_pending_and_delivered_once(
        self, gadget: Gadget, client: LocalClient, fds: list[int]
    ) -> None:
        client.assign(MSIX, fds[:2])
        client.set_irqs(MSIX, MASK | NONE, count=2)
        for _ in range(3):
            assert not gadget.irqs.trigger(MSIX, 1)
        assert gadget.irqs.pending(MSIX)[:2] == [False, True]
        client.set_irqs(MSIX, UNMASK | BOOL, count=2, data=b"\0\1")
        assert [events(fd) for fd in fds[:2]] == [0, 1]
        assert not gadget.irqs.trigger(MSIX, 0), "still masked"

    def test_the_device_is_told(self, gadget: Gadget, client: LocalClient) -> None:
        client.set_irqs(MSIX, MASK | NONE, start=3, count=2)
        client.set_irqs(MSIX, UNMASK | NONE, start=3, count=2)
        assert gadget.log[-2:] == [("irq", MSIX, 3, 2, True), ("irq", MSIX, 3, 2, False)]

    def test_eventfds_for_masking(
        self, gadget: Gadget, client: LocalClient, fds: list[int]
    ) -> None:
        """The given descriptors are signalled when the state changes, by either side."""
        client.set_irqs(MSIX, MASK | EVENTFD, count=1, fds=fds[:1])
        client.set_irqs(MSIX, UNMASK | EVENTFD, count=1, fds=fds[1:2])
        gadget.irqs.set_mask(MSIX, 0, True)
        gadget.irqs.set_mask(MSIX, 0, True)
        assert [events(fd) for fd in fds[:2]] == [1, 0]
        client.set_irqs(MSIX, UNMASK | NONE, count=1)
        assert [events(fd) for fd in fds[:2]] == [0, 1]

    def test_holding_back_a_whole_index(
        self, gadget: Gadget, client: LocalClient, fds: list[int]
    ) -> None:
        client.assign(MSIX, fds[:2])
        gadget.irqs.hold(MSIX, True)
        gadget.irqs.trigger(MSIX, 1)
        assert [events(fd) for fd in fds[:2]] == [0, 0]
        gadget.irqs.hold(MSIX, False)
        assert [events(fd) for fd in fds[:2]] == [0, 1]

    @pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK])
    def test_a_full_eventfd_does_not_block(
        self, gadget: Gadget, client: LocalClient, flags: int
    ) -> None:
        fd = os.eventfd(0, flags)
        os.eventfd_write(fd, 2**64 - 2)
        client.assign(MSIX, [fd])
        assert gadget.irqs.trigger(MSIX)
        assert os.eventfd_read(fd) == 2**64 - 2
        assert os.get_blocking(fd) == (not flags), "the client's descriptor was changed"
        os.close(fd)

    def test_a_vector_that_is_not_there(self, gadget: Gadget) -> None:
        for index, vector in ((MSIX, 2048), (MSI, 0), (MSIX, -1)):
            with pytest.raises(UsageError):
                gadget.irqs.trigger(index, vector)


class TestIntx:
    """A level that masks itself when it is signalled."""

    def test_signalled_again_on_unmask_while_asserted(
        self, gadget: Gadget, client: LocalClient, fds: list[int]
    ) -> None:
        client.assign(INTX, fds[:1])
        gadget.irqs.set_intx(True)
        gadget.irqs.set_intx(True)
        assert events(fds[0]) == 1
        client.set_irqs(INTX, UNMASK | NONE, count=1)
        assert events(fds[0]) == 1
        gadget.irqs.set_intx(False)
        client.set_irqs(INTX, UNMASK | NONE, count=1)
        assert events(fds[0]) == 0
        gadget.irqs.set_intx(True)
        assert events(fds[0]) == 1

    def test_asserted_before_there_is_an_eventfd(
        self, gadget: Gadget, client: LocalClient, fds: list[int]
    ) -> None:
        gadget.irqs.set_intx(True)
        client.assign(INTX, fds[:1])
        assert events(fds[0]) == 1

    def test_masked_by_the_client(
        self, gadget: Gadget, client: LocalClient, fds: list[int]
    ) -> None:
        client.assign(INTX, fds[:1])
        client.set_irqs(INTX, MASK | NONE, count=1)
        gadget.irqs.set_intx(True)
        assert events(fds[0]) == 0
        client.set_irqs(INTX, UNMASK | NONE, count=1)
        assert events(fds[0]) == 1

    def test_disabling_and_enabling_starts_unmasked(
        self, gadget: Gadget, client: LocalClient, fds: list[int]
    ) -> None:
        client.assign(INTX, fds[:1])
        gadget.irqs.set_intx(True)
        client.set_irqs(INTX, TRIGGER | NONE, count=0)
        client.assign(INTX, fds[1:2])
        assert [events(fd) for fd in fds[:2]] == [1, 1]


class TestDeclaration:
    @pytest.mark.parametrize("counts", [{MSIX: 2049}, {INTX: 2}, {5: 1}, {MSIX: -1}])
    def test_that_cannot_be(self, counts: dict[int, int]) -> None:
        with pytest.raises(UsageError):
            IrqTable(counts)

    def test_closing_twice(self, fds: list[int]) -> None:
        table = IrqTable({MSIX: 1})
        fd = os.dup(fds[0])
        request = IrqSet(argsz=20, flags=TRIGGER | EVENTFD, index=MSIX, start=0, count=1)
        table.set(request, b"", [fd])
        table.close()
        table.close()
        with pytest.raises(OSError, match="descriptor"):
            os.fstat(fd)


def test_intx_is_unmasked_by_an_eventfd(
    client: LocalClient, gadget: Gadget, fds: list[int]
) -> None:
    """QEMU under KVM gives one, which KVM signals at the end of the interrupt; it was refused."""
    watched: list[int | None] = []
    gadget.irqs.watch_unmask(watched.append)
    client.assign(INTX, fds[:1])
    client.set_irqs(INTX, UNMASK | EVENTFD, count=1, fds=fds[1:2])
    assert (watched[0], len(watched)) == (None, 2)
    gadget.intx.set(True)
    assert events(fds[0]) == 1
    gadget.irqs.unmask_intx()
    assert events(fds[0]) == 0, "not signalled yet"
    os.eventfd_write(fds[1], 1)
    gadget.irqs.unmask_intx()
    assert events(fds[0]) == 1, "still asserted"
    gadget.intx.set(False)
    os.eventfd_write(fds[1], 1)
    gadget.irqs.unmask_intx()
    assert events(fds[0]) == 0
    client.set_irqs(INTX, UNMASK | NONE, count=1)
    assert events(fds[1]) == 0, "the eventfd is the client's to signal"
    client.close()
    assert watched[-1] is None
