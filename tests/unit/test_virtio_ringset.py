# SPDX-License-Identifier: Apache-2.0
"""``vballoon.virtio.ringset``: the balloon on a third transport, of a few lines.

The toy transport does what a transport must do and no more: it hands over guest memory, features
and ring addresses, and passes kicks and notifications on.  If it does not fit into 80 lines, the
ring set leaves too much to its transports.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping

import numpy as np
import pytest
from tests.fakes.driver import DriverRing, make_driver
from tests.fakes.echo_device import EchoDevice
from tests.fakes.memory import Arena, make_memory

from vballoon.balloon import Balloon
from vballoon.errors import MemoryFault, ProtocolError, QueueError
from vballoon.memory import GuestMemory
from vballoon.skipmap import Provenance
from vballoon.virtio import (
    DeviceQueue,
    RingFault,
    RingRecord,
    RingSet,
    TransportEvents,
    VirtioDevice,
)
from vballoon.virtqueue import RingState, Virtqueue, make_virtqueue
from virtio_formats.virtio import features as f

V1 = f.mask(f.VIRTIO_F_VERSION_1)
MIB = 1 << 20
SIZE = 16


class Toy(TransportEvents):
    """A transport whose driver is in the same process: method calls instead of messages."""

    def __init__(self, device: VirtioDevice, *, features: int = V1) -> None:
        self.memory: GuestMemory = make_memory((0, 32 * MIB))
        self.features = device.device_features | features
        self.rings = RingSet(device, self, events=self)
        self.drivers: dict[int, DriverRing] = {}
        self.notified: list[int] = []
        self.broken: list[tuple[int, str]] = []
        self.device = device
        self.arena = Arena(0x1000, 8 * MIB)
        device.attach(self)

    @property
    def queues(self) -> Mapping[int, DeviceQueue]:
        return self.rings.running

    def config_changed(self) -> None:
        """Do nothing: the driver of this transport reads the configuration when it wants to."""

    def build_ring(self, index: int, record: RingRecord) -> Virtqueue:
        at = self.drivers[index].addresses
        return make_virtqueue(self.memory, SIZE, at, self.features, record.position)

    def device_starts(self) -> None:
        """Do nothing: a driver of this transport resets the device itself."""

    def notify(self, index: int) -> None:
        self.notified.append(index)

    def ring_broken(self, index: int, error: QueueError) -> None:
        """Do nothing: the event is recorded already."""

    def queue_broken(self, index: int, rule: str, detail: str) -> None:
        self.broken.append((index, rule))

    def start(self, *indices: int) -> None:
        for index in indices:
            if index not in self.drivers:
                ring = make_driver(self.memory, SIZE, self.features, arena=self.arena)
                self.drivers[index] = ring
        self.serve(*self.rings.settle(indices))

    def serve(self, *indices: int) -> None:
        for index in indices:
            while self.rings.process(index):
                pass

    def send(self, index: int, data: bytes) -> list[tuple[int, int]]:
        driver = self.drivers[index]
        buffer = driver.buffer(len(data))
        self.memory.write(buffer.addr, data)
        driver.add(buffer)
        driver.publish()
        self.serve(index)
        return driver.collect()


def test_a_transport_is_less_than_80_lines():
    assert len(inspect.getsource(Toy).splitlines()) < 80


@pytest.fixture
def toy():
    made = Toy(EchoDevice())
    yield made
    made.memory.close()


def test_the_balloon_inflates_over_a_toy_transport():
    balloon = Balloon()
    toy = Toy(balloon)
    toy.start(0, 1)
    toy.memory.write(16 * MIB, b"\x5a" * 8192)
    assert len(toy.send(0, np.array([4096, 4097], "<u4").tobytes())) == 1
    assert not any(toy.memory.read(16 * MIB, 8192)), "the pages were discarded"
    assert balloon.skipmap.extents(Provenance.BALLOONED).tolist() == [[4096, 4098]]
    assert toy.notified == [0]
    assert len(toy.send(1, np.array([4096], "<u4").tobytes())) == 1
    assert balloon.skipmap.extents(Provenance.BALLOONED).tolist() == [[4097, 4098]]
    assert toy.rings.status(0, size=SIZE, started=True).given == 1
    toy.memory.close()


def test_a_parked_ring_continues_with_its_counters(toy):
    toy.start(0)
    toy.send(0, b"one")
    toy.rings.park()
    assert not toy.queues
    assert toy.rings.record(0).position == RingState(avail=1, used=1)
    toy.start(0)
    assert len(toy.send(0, b"two")) == 1
    assert toy.rings.record(0).taken == 2
    assert toy.device.seen == [b"one", b"two"]


def test_a_ring_ended_is_forgotten_and_the_others_continue(toy):
    toy.start(0, 1)
    toy.send(0, b"one")
    toy.send(1, b"two")
    assert toy.rings.end(0).position == RingState(avail=1, used=1)
    assert toy.rings.record(0) == RingRecord()
    toy.start(1)
    assert toy.device.started_with == [(0, 1), (1,)]
    assert len(toy.send(1, b"three")) == 1


def test_settling_on_the_same_rings_does_not_disturb_them(toy):
    toy.start(0)
    toy.start(0)
    assert toy.device.log.count("start") == 1
    assert "stop" not in toy.device.log


def test_the_device_is_stopped_before_a_ring_goes_away(toy):
    toy.device.hold = 1
    toy.start(0, 1)
    assert toy.send(0, b"held") == []
    toy.start(1)
    assert len(toy.drivers[0].collect()) == 1


def test_a_ring_without_memory_waits_if_it_has_run_before(toy, caplog):
    caplog.set_level(logging.INFO)
    toy.start(0)
    toy.send(0, b"one")
    toy.rings.park()
    memory, toy.memory = toy.memory, make_memory((64 * MIB, MIB))
    toy.start(0)
    toy.start(0)
    assert not toy.queues
    assert not toy.broken
    assert caplog.text.count("ring memory is not mapped yet") == 1, "tried once for each table"
    toy.rings.park()
    toy.memory.close()
    toy.memory = memory
    toy.start(0)
    assert len(toy.send(0, b"two")) == 1


def test_a_ring_without_memory_is_broken_if_it_has_not_run(toy):
    toy.start(1)
    toy.rings.park()
    toy.drivers[0] = toy.drivers[1]
    memory, toy.memory = toy.memory, make_memory((64 * MIB, MIB))
    toy.start(0)
    assert toy.broken[0][0] == 0
    assert toy.rings.status(0, size=SIZE, started=True).state == "broken"
    toy.memory.close()
    toy.memory = memory


@pytest.mark.parametrize(
    ("kind", "text", "rule"),
    [
        (ZeroDivisionError, ["a bug"], "internal"),
        (QueueError, ["desc-address", "there"], "desc-address"),
        (MemoryFault, ["memory-address", "there"], "memory-address"),
        (ProtocolError, ["odd", "from a device"], "odd"),
    ],
)
def test_a_fault_of_the_device_stops_one_ring(toy, caplog, kind, text, rule):
    caplog.set_level(logging.DEBUG)
    toy.start(0, 1)
    toy.device.fault = kind(*text)
    toy.send(0, b"x")
    toy.device.fault = None
    assert toy.broken == [(0, rule)]
    assert "Traceback" not in caplog.text
    assert all(record.exc_info is None for record in caplog.records)
    if rule == "internal":
        assert "ZeroDivisionError: a bug (echo_device.py:" in caplog.text
    assert toy.rings.status(0, size=SIZE, started=True).state == "broken"
    assert len(toy.send(1, b"y")) == 1


def test_a_device_that_cannot_stop_leaves_no_ring_bound(toy):
    def stop():
        raise OSError("a bug")

    toy.start(0)
    toy.device.stop = stop
    with pytest.raises(OSError, match="a bug"):
        toy.rings.park()
    assert not toy.queues
    assert toy.rings.queue(0) is None


def test_a_broken_ring_stays_broken_until_it_is_ended(toy):
    toy.start(0)
    toy.device.fault = ZeroDivisionError("a bug")
    toy.send(0, b"x")
    toy.device.fault = None
    toy.rings.park()
    toy.start(0)
    assert not toy.queues
    toy.rings.end(0)
    del toy.drivers[0]
    toy.start(0)
    assert len(toy.send(0, b"y")) == 1


def test_another_process_continues_from_the_records(toy):
    toy.start(0, 1)
    toy.send(0, b"one")
    toy.device.fault = ZeroDivisionError("a bug")
    toy.send(1, b"x")
    assert toy.rings.state()[0].position is None, "it is in guest memory while the ring runs"
    toy.rings.park()
    state = toy.rings.state()
    other = Toy(EchoDevice())
    other.memory.close()
    other.memory, other.drivers, other.arena = toy.memory, toy.drivers, toy.arena
    other.rings.restore(state)
    assert other.rings.state() == state
    other.start(0, 1)
    assert list(other.queues) == [0]
    assert other.rings.record(1).broken == RingFault("internal", state[1].broken.detail)
    assert len(other.send(0, b"two")) == 1
    assert other.device.seen == [b"two"]


def test_the_records_of_another_device_are_refused(toy):
    toy.start(0)
    before = toy.rings.state()
    with pytest.raises(ProtocolError, match="ring-records"):
        toy.rings.restore(before[:-1])
    assert toy.rings.state() == before
    assert 0 in toy.queues
