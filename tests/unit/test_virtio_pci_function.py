# SPDX-License-Identifier: Apache-2.0
"""``vballoon.virtio_pci``: a device served end to end through rings, doorbells and interrupts.

Virtio 1.4, *Virtio Over PCI Bus*, *Device Reset*, *Virtqueue Reset*.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.backends import Recorder
from tests.fakes.descriptors import open_fds
from tests.fakes.echo import Echo
from tests.fakes.vfio_client import QEMU_VERSION_DATA, FakeClient, message
from tests.fakes.virtio_pci import MODES, RAM_BASE, RAM_SIZE, Guest, end, make, send

from vballoon.virtio import device
from vballoon.virtio_pci import DEFAULT_RING_FEATURES, VirtioPciFunction
from virtio_formats.vfio_user import Command, RegionAccess, RegionIoFds, Version
from virtio_formats.virtio import features as f
from virtio_formats.virtio.pci import CapType
from virtio_formats.virtio.status import DeviceStatus as S

V1 = f.mask(f.VIRTIO_F_VERSION_1)
RUNNING = S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK | S.DRIVER_OK


@pytest.fixture(params=MODES)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Echo, Guest]]:
    before = open_fds()
    echo, guest = make(request.param)
    yield echo, guest
    end(guest)
    assert open_fds() == before, "descriptors leaked"


@pytest.fixture
def mapped() -> Iterator[tuple[Echo, Guest]]:
    echo, guest = make()
    yield echo, guest
    end(guest)


class TestServing:
    def test_a_buffer_there_and_back(self, pair: tuple[Echo, Guest]) -> None:
        _echo, guest = pair
        guest.start(V1, (0, 1))
        (answer,) = send(guest, 0, b"hello, device")
        assert guest.rings[0].collect() == [(0, 13)]
        assert guest.memory.read(answer, 13) == b"ecived ,olleh"
        assert guest.interrupts() == [0, 1, 0]

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("extra", [0, f.mask(f.VIRTIO_F_EVENT_IDX)])
    @pytest.mark.parametrize("mode", MODES)
    def test_ring_formats(self, mode: str, packed: bool, extra: int) -> None:
        features = V1 | extra | (f.mask(f.VIRTIO_F_RING_PACKED) if packed else 0)
        _, guest = make(mode, DEFAULT_RING_FEATURES | f.mask(f.VIRTIO_F_RING_PACKED))
        guest.start(features)
        for round_ in range(20):
            texts = [bytes([round_, n]) * 5 for n in range(3)]
            answers = send(guest, 0, *texts)
            assert len(guest.rings[0].collect()) == 3
            for text, answer in zip(texts, answers, strict=True):
                assert guest.memory.read(answer, 10) == text[::-1]
        end(guest)

    def test_many_doorbells_at_once_are_one_visit(
        self, mapped: tuple[Echo, Guest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(device, "SECONDS_PER_KICK", 60)  # however slow this machine is
        _, guest = mapped
        guest.start(V1)
        send(guest, 0, b"x", kick=False)
        cap = guest.caps[CapType.NOTIFY_CFG]
        bell = RegionAccess(offset=cap.offset, region=cap.bar, count=2).build() + b"\0\0"
        guest.client.send(message(Command.REGION_WRITE, bell, flags=0x10) * 50)
        guest.client.run()
        assert guest.function.queues[0].kicked == 2  # the first look at the start, and this

    def test_buffers_from_before_driver_ok(self, pair: tuple[Echo, Guest]) -> None:
        """They are served although no doorbell is to come."""
        _, guest = pair
        guest.negotiate(V1)
        guest.use_msix()
        guest.set_up(0, vector=1)
        send(guest, 0, b"early")
        assert guest.rings[0].collect() == [], "used before DRIVER_OK"
        guest.set("device_status", RUNNING)
        assert guest.rings[0].collect() == [(0, 5)]

    def test_nothing_is_used_without_driver_ok(self, mapped: tuple[Echo, Guest]) -> None:
        echo, guest = mapped
        guest.negotiate(V1)
        guest.set_up(0)
        send(guest, 0, b"early")
        assert not guest.function.queues
        assert not [entry for entry in echo.log if entry.startswith("start")]

    def test_a_queue_that_is_not_enabled(self, mapped: tuple[Echo, Guest]) -> None:
        _, guest = mapped
        guest.start(V1, (0,))
        guest.set_up(1, enable=False)
        send(guest, 1, b"no")
        assert guest.rings[1].collect() == []

    def test_queues_without_a_vector_send_nothing(self, mapped: tuple[Echo, Guest]) -> None:
        _, guest = mapped
        guest.negotiate(V1)
        guest.use_msix()
        guest.set_up(0)
        guest.set("device_status", RUNNING)
        send(guest, 0, b"quiet")
        assert guest.rings[0].collect() == [(0, 5)]
        assert guest.interrupts() == [0, 0, 0]

    def test_with_intx(self, mapped: tuple[Echo, Guest]) -> None:
        _, guest = mapped
        guest.negotiate(V1)
        guest.use_intx()
        guest.set_up(0)
        guest.set("device_status", RUNNING)
        send(guest, 0, b"level")
        assert os.eventfd_read(guest.intx) == 1
        assert guest.isr() == 1
        assert guest.rings[0].collect() == [(0, 5)]

    def test_notification_data(self) -> None:
        ring_features = DEFAULT_RING_FEATURES | f.mask(f.VIRTIO_F_NOTIFICATION_DATA)
        _, guest = make("mapped", ring_features)
        guest.start(V1 | f.mask(f.VIRTIO_F_NOTIFICATION_DATA))
        send(guest, 0, b"data", kick=False)
        guest.kick(0, data=1 << 16)
        assert guest.rings[0].collect() == [(0, 4)]
        end(guest)

    def test_doorbells_that_are_not_there(self, mapped: tuple[Echo, Guest]) -> None:
        _, guest = mapped
        guest.start(V1)
        cap = guest.caps[CapType.NOTIFY_CFG]
        for offset in (8, 1, 2, 4092):
            guest.client.write(cap.bar, cap.offset + offset, b"\0\0", expect=errno.EINVAL)

    def test_doorbells_by_eventfd(self, mapped: tuple[Echo, Guest]) -> None:
        _, guest = mapped
        cap = guest.caps[CapType.NOTIFY_CFG]
        request = RegionIoFds(argsz=512, flags=0, index=cap.bar, count=0)
        reply = guest.client.call(Command.DEVICE_GET_REGION_IO_FDS, request.build())
        assert RegionIoFds.parse(reply.payload[:16]).count == 2
        events = guest.function.regions[cap.bar].io_events
        assert [(e.offset - cap.offset, e.size) for e in events] == [(0, 2), (4, 2)]
        for fd in reply.fds:
            os.close(fd)
        guest.start(V1)
        send(guest, 0, b"eventfd", kick=False)
        events[0].callback()
        guest.client.run()
        assert guest.rings[0].collect() == [(0, 7)]


class TestBrokenQueues:
    def test_one_stops_and_the_other_goes_on(self) -> None:
        events = Recorder()
        _, guest = make(events=events)
        guest.start(V1, (0, 1))
        guest.rings[0].desc[0] = (1 << 50, 16, 0, 0)  # type: ignore[attr-defined]
        guest.rings[0].avail[1] = 1  # type: ignore[attr-defined]
        guest.kick(0)
        assert events.told[1:] == [("broken", 0, "desc-address")]
        assert guest.get("device_status") == RUNNING | S.NEEDS_RESET
        assert guest.interrupts() == [1, 0, 0], "a configuration change notification"
        send(guest, 1, b"one", b"two")
        assert len(guest.rings[1].collect()) == 1
        send(guest, 0, b"dead")
        assert len(events.told) == 2
        end(guest)

    def test_no_descriptor_is_kept_by_what_broke(self) -> None:
        """An exception's traceback holds frames, and those the mapping of guest memory."""
        before = open_fds()
        _, guest = make()
        guest.start(V1)
        guest.rings[0].desc[0] = (1 << 50, 16, 0, 0)  # type: ignore[attr-defined]
        guest.rings[0].avail[1] = 1  # type: ignore[attr-defined]
        guest.kick(0)
        end(guest)
        assert open_fds() == before

    @pytest.mark.parametrize("address", [0, RAM_BASE + RAM_SIZE, RAM_BASE + 1, 2**64 - 16])
    def test_rings_outside_of_memory(self, mapped: tuple[Echo, Guest], address: int) -> None:
        _, guest = mapped
        guest.negotiate(V1)
        guest.set_up(0, enable=False)
        guest.set("queue_desc", address)
        guest.set("queue_enable", 1)
        guest.set("device_status", RUNNING)
        assert guest.get("device_status") & S.NEEDS_RESET
        guest.kick(0)
        assert not guest.function.queues

    def test_a_fault_of_the_device_stops_the_queue(self, mapped: tuple[Echo, Guest]) -> None:
        echo, guest = mapped
        guest.start(V1)
        echo.fail_with = ZeroDivisionError("oops")
        send(guest, 0, b"boom")
        assert guest.function.queues[0].broken is not None
        assert guest.function.queues[0].broken.rule == "internal"
        guest.set("device_status", 0)
        echo.fail_with = None
        guest.start(V1)
        send(guest, 0, b"fine")
        assert len(guest.rings[0].collect()) == 1

    def test_a_client_that_refuses_dma(self) -> None:
        _, guest = make("messages")
        guest.start(V1)
        guest.client.dma_error = errno.EIO
        send(guest, 0, b"lost")
        assert guest.get("device_status") & S.NEEDS_RESET
        end(guest)


class TestReset:
    def test_held_buffers_come_back_first(self, mapped: tuple[Echo, Guest]) -> None:
        _echo, guest = mapped
        guest.start(V1, (0, 1))
        send(guest, 1, b"held")
        assert guest.rings[1].collect() == []
        guest.set("device_status", 0)
        assert guest.rings[1].collect() == [(0, 0)]

    def test_again_and_again(self, pair: tuple[Echo, Guest]) -> None:
        _, guest = pair
        for _ in range(10):
            guest.start(V1)
            (answer,) = send(guest, 0, b"abc")
            assert guest.memory.read(answer, 3) == b"cba"
        guest.interrupts()

    def test_without_waiting_for_zero(self, mapped: tuple[Echo, Guest]) -> None:
        """A driver should wait, firmware does not."""
        _, guest = mapped
        guest.start(V1)
        guest.set("device_status", 0)
        guest.set("device_status", S.ACKNOWLEDGE)
        assert guest.get("device_status") == S.ACKNOWLEDGE

    def test_in_the_middle_of_the_devices_work(self) -> None:
        """device_status keeps its value until the work has ended."""
        echo, guest = make("messages")
        guest.start(V1)
        seen: list[int] = []

        def meanwhile() -> None:
            guest.client.before_dma = None
            guest.set("device_status", 0, post=True)
            seen.append(guest.get("device_status"))

        guest.client.run = lambda: None  # type: ignore[method-assign]
        send(guest, 0, b"busy")
        del guest.client.run
        guest.client.before_dma = meanwhile
        guest.client.run()
        assert seen == [RUNNING], "reset in the middle of the work"
        assert guest.get("device_status") == 0
        assert echo.log[-2:] == ["stop", "reset"]
        end(guest)

    def test_no_message_is_sent_while_the_client_waits(self) -> None:
        """QEMU holds its lock until DEVICE_RESET is answered."""
        _, guest = make("messages")
        guest.start(V1, (0, 1))
        send(guest, 1, b"held")
        sent = guest.client.session.requests.sent
        guest.client.call(Command.DEVICE_RESET, run=False)
        assert guest.client.session.requests.sent == sent
        end(guest)

    def test_a_buffer_held_in_memory_reached_by_messages_is_no_fault(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It cannot be given back in a reset, and need not be."""
        events = Recorder()
        _echo, guest = make("messages", events=events)
        guest.start(V1, (0, 1))
        send(guest, 1, b"held")
        guest.set("device_status", 0)
        guest.client.call(Command.DEVICE_RESET)
        assert events.told == [("connected",)]
        assert not caplog.text
        guest.start(V1, (0, 1))
        send(guest, 0, b"x")
        assert len(guest.rings[0].collect()) == 1
        end(guest)


class TestVirtqueueReset:
    FEATURES = V1 | f.mask(f.VIRTIO_F_RING_RESET)

    def test_one_queue_starts_over_and_the_other_goes_on(self, pair: tuple[Echo, Guest]) -> None:
        _echo, guest = pair
        guest.start(self.FEATURES, (0, 1))
        send(guest, 0, b"first")
        send(guest, 1, b"held")
        guest.set("queue_select", 0)
        guest.set("queue_reset", 1)
        assert guest.get("queue_reset") == 0
        assert (guest.get("queue_enable"), guest.get("queue_desc")) == (0, 0)
        assert sorted(guest.function.queues) == [1]
        assert guest.get("device_status") == RUNNING
        guest.set_up(0, vector=1)
        guest.interrupts()
        (answer,) = send(guest, 0, b"again")
        assert guest.memory.read(answer, 5) == b"niaga"
        assert guest.interrupts()[1] == 1
        send(guest, 1, b"next")
        assert next(ident for ident, _ in guest.rings[1].collect()) == 0

    def test_it_takes_time_while_the_device_works(self, mapped: tuple[Echo, Guest]) -> None:
        _, guest = mapped
        guest.start(self.FEATURES)
        guest.set("queue_select", 0)
        guest.function._busy = True
        guest.set("queue_reset", 1)
        assert guest.get("queue_reset") == 1
        guest.set("queue_enable", 1)
        guest.function._busy = False
        guest.function._schedule()
        guest.client.run()
        assert (guest.get("queue_reset"), guest.get("queue_enable")) == (0, 0)

    def test_a_broken_queue_recovers(self, mapped: tuple[Echo, Guest]) -> None:
        _, guest = mapped
        guest.start(self.FEATURES)
        guest.rings[0].avail[1] = 1000  # type: ignore[attr-defined]
        guest.kick(0)
        assert guest.function.queues[0].broken
        guest.set("queue_reset", 1)
        guest.set_up(0, vector=1)
        send(guest, 0, b"well")
        assert len(guest.rings[0].collect()) == 1

    def test_only_where_it_was_negotiated(self, mapped: tuple[Echo, Guest]) -> None:
        _, guest = mapped
        guest.start(V1)
        guest.set("queue_select", 0)
        guest.set("queue_reset", 1)
        assert guest.get("queue_enable") == 1


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(0, 0x3FFF), st.binary(min_size=1, max_size=8)),
            st.tuples(st.just("read"), st.integers(0, 0x3FFF), st.integers(1, 8)),
            st.tuples(st.just("common"), st.integers(0, 63), st.binary(min_size=1, max_size=8)),
            st.tuples(st.just("config"), st.integers(0, 300), st.binary(min_size=1, max_size=8)),
            st.tuples(st.just("status"), st.sampled_from([0, 1, 3, 11, 15, 255]), st.just(0)),
        ),
        max_size=40,
    ),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_sequence_of_register_accesses(steps: list[tuple[str, int, Any]], mapped: bool) -> None:
    """Nothing escapes, every access is answered, and the device still works after a reset."""
    before = open_fds()
    function = VirtioPciFunction(Echo())
    guest = Guest(function, mapped=mapped)
    guest.start(V1 | f.mask(f.VIRTIO_F_RING_RESET), (0, 1))
    client = guest.client
    for kind, offset, what in steps:
        if kind == "read":
            request = RegionAccess(offset=offset, region=0, count=what).build()
            client.send(message(Command.REGION_READ, request))
        elif kind == "status":
            guest.set("device_status", offset)
        else:
            region = 7 if kind == "config" else 0
            request = RegionAccess(offset=offset, region=region, count=len(what)).build()
            client.send(message(Command.REGION_WRITE, request + what))
        client.run()
        assert len(client.inbox) <= 1
        client.inbox.clear()
    assert client.session.is_open
    client.call(Command.DEVICE_RESET)
    guest.start(V1)
    (answer,) = send(guest, 0, b"alive")
    assert guest.memory.read(answer, 5) == b"evila"
    end(guest)
    assert open_fds() == before


def test_what_qemu_proposes_is_enough() -> None:
    """A reply larger than the request would be fatal for QEMU."""
    function = VirtioPciFunction(Echo())
    client = FakeClient(function)
    reply = client.call(Command.VERSION, Version(major=0, minor=0).build() + QEMU_VERSION_DATA)
    assert len(reply.payload) <= Version.SIZE + len(QEMU_VERSION_DATA.replace(b" ", b""))
    client.close()
    function.close()
