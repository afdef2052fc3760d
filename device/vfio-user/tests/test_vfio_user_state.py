# SPDX-License-Identifier: Apache-2.0
"""``vfio_user.state``, ``resume``: the state of a session as a value, packed and taken back.

A server that dies between two messages is continued by another process from this value and the
descriptors alone, so it is checked like any other untrusted input.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
from gadget import Gadget
from helpers import open_fds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vfio_user import DmaError, RequestError
from vfio_user.state import BaseState, DmaWindow, IrqState, SessionState
from vfio_user.testing import QEMU_VERSION_DATA, LocalClient, Ram, events, message
from virtio_formats.vfio_user import (
    Capabilities,
    Command,
    DeviceFeature,
    Feature,
    FeatureFlags,
    IrqSetFlags,
    LoggingControl,
    LoggingRange,
    MigState,
    PciIrq,
)
from virtio_formats.vfio_user.state import (
    BASE_MAGIC,
    SESSION_MAGIC,
    BaseBody,
    SessionBody,
    seal,
    unseal,
)

BASE = 0x40000000
MASK = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_MASK


class Setup:
    """A client that sets a device up, one step at a time, and everything it holds."""

    def __init__(self) -> None:
        self.device = Gadget()
        self.client = LocalClient(self.device)
        self.client.negotiate()
        self.files = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
        self.rams = [Ram(BASE + i * 0x100000, 0x4000) for i in range(3)]

    def apply(self, step: tuple[Any, ...]) -> None:
        client, (kind, number) = self.client, step
        ram, index = self.rams[number % 3], number % 3
        mapped = {region.address for region in self.device.dma.regions}
        match kind:
            case "map" | "map by message" if ram.address not in mapped:
                client.map(ram, mapped=kind == "map", flags=1 + number % 3 if number > 2 else 3)
            case "unmap" if ram.address in mapped:
                client.unmap(ram.address, ram.size)
            case "assign":
                client.assign(PciIrq.MSIX, [self.files[index]], start=number)
            case "mask":
                client.set_irqs(PciIrq.MSIX, MASK, start=number, count=1)
            case "bar":
                self.device.irqs.set_mask(PciIrq.MSIX, number, True)
            case "trigger":
                self.device.irqs.trigger(PciIrq.MSIX, number)
            case "hold":
                self.device.irqs.hold(PciIrq.MSIX, number % 2 == 0)
            case "intx":
                self.device.intx.set(number % 2 == 0)
            case "config":
                client.set_config(0x04, number & 0x407, 2)
            case "dma" if self.device.dma.regions:
                ram.write(ram.address, b"data")
                with contextlib.suppress(DmaError):
                    self.device.dma.read(ram.address, 4)
            case "log":
                self.log(number)
            case "migrate":
                self.feature(
                    Feature.MIG_DEVICE_STATE,
                    MigState(device_state=[1, 2, 3, 4, 6][number % 5], data_fd=0).build(),
                )

    def log(self, number: int) -> None:
        head = LoggingControl(page_size=4096, num_ranges=number % 2, reserved=0).build()
        ranges = LoggingRange(iova=BASE, length=0x1000 * (number + 1)).build()
        self.feature(Feature.DMA_LOGGING_START, head + ranges * (number % 2))

    def feature(self, index: int, data: bytes) -> None:
        head = DeviceFeature(argsz=4096, flags=FeatureFlags.SET | index).build()
        self.client.send(message(Command.DEVICE_FEATURE, head + data))
        self.client.inbox.clear()  # some transitions are refused

    def close(self) -> None:
        self.client.close()
        self.device.close()
        for fd in self.files:
            os.close(fd)
        for ram in self.rams:
            ram.close()


KINDS = (
    "map", "map by message", "unmap", "assign", "mask", "bar", "trigger", "hold", "intx",
    "config", "dma", "log", "migrate",
)  # fmt: skip
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2047)), max_size=12)
ALL_STEPS = [(kind, number) for number, kind in enumerate(KINDS)]


@pytest.fixture
def setup() -> Iterator[Setup]:
    """Return a client that has set up something of every kind."""
    made = Setup()
    for step in [*ALL_STEPS, ("map", 0), ("map by message", 1), ("assign", 0), ("intx", 0)]:
        made.apply(step)
    yield made
    made.close()


def resume(state: SessionState, fds: dict[int, int]) -> tuple[Gadget, LocalClient]:
    device = Gadget()
    client = LocalClient(device)
    try:
        client.session.restore(state, fds)
    except BaseException:
        client.close()
        device.close()
        raise
    return device, client


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(STEPS)
def test_a_restored_session_has_the_same_state(steps: list[tuple[str, int]]) -> None:
    gc.collect()  # a mapping holds a descriptor of its own
    before = open_fds()
    setup = Setup()
    for step in steps:
        setup.apply(step)
    state = setup.client.session.state()
    assert SessionState.unpack(state.pack()) == state
    device, client = resume(state, setup.device.descriptors.by_slot())
    assert client.session.state() == state
    assert device.base_state() == state.base
    client.close()
    device.close()
    setup.close()
    assert open_fds() == before


class TestAfterwards:
    def test_interrupts_and_memory_work(self, setup: Setup) -> None:
        state = setup.client.session.state()
        device, client = resume(state, setup.device.descriptors.by_slot())
        device.irqs.hold(PciIrq.MSIX, False)
        assert device.irqs.trigger(PciIrq.MSIX, 0)
        assert events(setup.files[0]) == 1
        setup.rams[0].write(BASE, b"from the client")
        assert device.dma.read(BASE, 15) == b"from the client"
        client.ram.append(setup.rams[1])
        setup.rams[1].write(setup.rams[1].address, b"by message")
        assert device.dma.read(setup.rams[1].address, 10) == b"by message"
        client.close()
        device.close()

    def test_nothing_is_signalled_twice(self, setup: Setup) -> None:
        setup.client.assign(PciIrq.INTX, [setup.files[1]])
        assert events(setup.files[1]) == 1, "INTx is asserted"
        state = setup.client.session.state()
        device, client = resume(state, setup.device.descriptors.by_slot())
        assert events(setup.files[1]) == 0, "and has masked itself"
        client.close()
        device.close()

    def test_everything_that_is_logged_is_reported_once(self, setup: Setup) -> None:
        """What was written before is not part of the state, and must not be lost."""
        setup.log(0)
        setup.device.dma.log.report(BASE, 0x4000, 4096, 4096)
        state = setup.client.session.state()
        assert state.ranges == ()
        device, client = resume(state, setup.device.descriptors.by_slot())
        report = device.dma.log.report(BASE, 0x4000, 4096, 4096)
        assert report[0] == 0b1111
        assert not any(device.dma.log.report(BASE, 0x4000, 4096, 4096))
        client.close()
        device.close()

    def test_the_slot_of_a_descriptor_stays(self, setup: Setup) -> None:
        before = setup.device.descriptors.by_slot()
        setup.client.unmap(BASE, setup.rams[0].size)
        setup.client.map(setup.rams[2])
        after = setup.device.descriptors.by_slot()
        kept = set(before) & set(after)
        assert {slot: os.fstat(before[slot]).st_ino for slot in kept if before[slot] == after[slot]}
        assert len(after) == len(before), "the smallest free slot was used again"

    def test_before_the_negotiation(self) -> None:
        device = Gadget()
        client = LocalClient(device)
        state = client.session.state()
        assert SessionState.unpack(state.pack()) == state
        again, other = resume(state, {})
        assert other.session.state() == state
        other.negotiate()
        for one in (client, other):
            one.close()
        device.close()
        again.close()


Changes = Iterator[tuple[str, dict[str, Any]]]


def changes(body: SessionBody | BaseBody) -> Changes:
    """Every field of *body* with other values."""
    for name in body._names:
        value = getattr(body, name)
        if isinstance(value, int):
            for other in {value ^ 1, value ^ 0x80, 0, 0x7F}:
                yield f"{name}={other}", {name: other}
        elif isinstance(value, bytes):
            for text in (value[:-1], value + b"x", b"", b"\xff" + value[1:]):
                yield f"{name}={text[:4]!r}", {name: text}
        else:
            yield f"{name} empty", {name: []}
            yield f"{name} twice", {name: value + value}
            for position, item in enumerate(value[:3]):
                for key in item if isinstance(item, dict) else ():
                    for other in {item[key] ^ 1, item[key] ^ 0x40, 0, 0x3F}:
                        items = copy.deepcopy(value)
                        items[position][key] = other
                        yield f"{name}[{position}].{key}={other}", {name: items}


def fields(body: SessionBody | BaseBody) -> dict[str, Any]:
    return {name: getattr(body, name) for name in body._names}


def corrupted(packed: bytes) -> Iterator[tuple[str, bytes]]:
    """Every field of a packed session with other values, the checksums right again."""
    body = SessionBody.parse(unseal(SESSION_MAGIC, packed))
    base = BaseBody.parse(unseal(BASE_MAGIC, body.base))
    for name, change in changes(body):
        yield name, seal(SESSION_MAGIC, SessionBody(**{**fields(body), **change}).build())
    for name, change in changes(base):
        inner = seal(BASE_MAGIC, BaseBody(**{**fields(base), **change}).build())
        whole = SessionBody(**{**fields(body), "base": inner})
        yield f"base.{name}", seal(SESSION_MAGIC, whole.build())


class TestCorruption:
    def test_a_changed_byte_is_refused(self, setup: Setup) -> None:
        packed = setup.client.session.state().pack()
        for position in range(len(packed)):
            changed = bytearray(packed)
            changed[position] ^= 0x10
            with pytest.raises(RequestError):
                SessionState.unpack(bytes(changed))
        for size in range(len(packed)):
            with pytest.raises(RequestError):
                SessionState.unpack(packed[:size])

    def test_a_changed_field_is_refused_or_harmless(self, setup: Setup) -> None:
        """Refused: as RequestError, with nothing changed.  Harmless: a working session."""
        packed = setup.client.session.state().pack()
        fds = setup.device.descriptors.by_slot()
        outcomes = {"refused": 0, "taken": 0}
        gc.collect()  # a mapping holds a descriptor of its own
        before = open_fds()
        for name, changed in corrupted(packed):
            device = Gadget()
            client = LocalClient(device)
            clean = device.base_state()
            try:
                client.session.restore(SessionState.unpack(changed), fds)
            except RequestError:
                outcomes["refused"] += 1
                assert device.base_state() == clean, name
                assert (device.log, device.dma.regions) == ([], []), name
                client.negotiate()
            else:
                outcomes["taken"] += 1
                taken, wanted = client.session.state(), SessionState.unpack(changed)
                # An interrupt that is due in the changed state has been delivered, and bits
                # of configuration space that cannot be written are the device's own.
                same = dataclasses.replace(wanted, irqs=taken.irqs, base=taken.base)
                assert taken == same, name
            if client.session.client is not None:
                client.call(Command.DEVICE_RESET)
            client.close()
            device.close()
            assert open_fds() == before, name
        assert min(outcomes.values()) > 30, outcomes

    def test_a_missing_descriptor(self, setup: Setup) -> None:
        state = setup.client.session.state()
        fds = setup.device.descriptors.by_slot()
        del fds[state.slots[0]]
        with pytest.raises(RequestError, match="no descriptor in slots"):
            resume(state, fds)

    def test_a_file_that_has_become_shorter(self, setup: Setup) -> None:
        state = setup.client.session.state()
        os.ftruncate(setup.rams[0].fd, 0x1000)
        with pytest.raises(RequestError):
            resume(state, setup.device.descriptors.by_slot())

    def test_a_device_that_refuses_a_region(self, setup: Setup) -> None:
        state = setup.client.session.state()
        fds = setup.device.descriptors.by_slot()
        gc.collect()  # a mapping holds a descriptor of its own
        before = open_fds()
        device = Gadget()
        client = LocalClient(device)

        def refuse(what: str) -> None:
            if what == "map":
                raise RequestError(errno.ENOSPC, what)

        device.refuse = refuse
        with pytest.raises(RequestError):
            client.session.restore(state, fds)
        assert ("detached",) in device.log
        assert device.dma.regions == []
        device.close()
        assert open_fds() == before


VECTOR = """
    564650530100000010010000e647f9bf750000000000000000100000000000100000000000ffff00000000000000
    10000000000000ffffffff0010000000000000000000100000000000000200000000000040000000000040000000
    00000000000000000000000300000000000000000010400000000000400000000000000000000000000000030000
    00ffffffff02000200030001000000ffffffffffffffff02040400ffffffffffffffffffffffff00000000020000
    0000000000005e00000056465042010000004e00000064efc455010040003412e81101000800000000ff00000000
    000000000000000004000000000000000100000000000000000000003412e8110000000000000000000000000001
    000002000202050002010600
"""


def test_the_packed_form_of_this_version() -> None:
    """A server of a later version must still read it, or raise STATE_VERSION and refuse it."""
    state = SessionState.unpack(bytes.fromhex(VECTOR))
    assert state.pack().hex() == "".join(VECTOR.split())
    assert state.dma == (
        DmaWindow(address=BASE, size=0x4000, flags=3, slot=0),
        DmaWindow(address=BASE + 0x100000, size=0x4000, flags=3),
    )
    assert [(irq.index, irq.vector, irq.trigger) for irq in state.irqs] == [
        (PciIrq.MSIX, 3, 1),
        (PciIrq.MSIX, 4, None),
    ]
    assert state.client == Capabilities.parse(QEMU_VERSION_DATA)
    assert state.base.irqs[0] == IrqState(index=PciIrq.MSIX, vector=5, barred=True)


def test_the_base_alone() -> None:
    device = Gadget()
    device.config.write(0x04, b"\7\4")
    device.irqs.trigger(PciIrq.MSIX, 3)
    device.irqs.set_mask(PciIrq.MSIX, 4, True)
    device.intx.set(True)
    packed = device.base_state().pack()
    other = Gadget()
    other.restore_base(BaseState.unpack(packed))
    assert other.base_state() == device.base_state()
    assert other.config.read(0x04, 4) == device.config.read(0x04, 4)
    assert other.irqs.pending(PciIrq.MSIX)[3]
    foreign = dataclasses.replace(device.base_state(), config=bytes(len(device.config.data)))
    with pytest.raises(RequestError, match="another device"):
        other.restore_base(foreign)
    device.close()
    other.close()


def test_masks_of_the_function_survive_its_client() -> None:
    """The mask bits of the MSI-X table were forgotten when the client disconnected."""
    device = Gadget()
    client = LocalClient(device)
    client.negotiate()
    device.irqs.set_mask(PciIrq.MSIX, 0, True)
    client.close()
    client = LocalClient(device)
    client.negotiate()
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    client.assign(PciIrq.MSIX, [fd])
    assert not device.irqs.trigger(PciIrq.MSIX, 0)
    device.irqs.set_mask(PciIrq.MSIX, 0, False)
    assert events(fd) == 1
    client.close()
    os.close(fd)
    device.close()
