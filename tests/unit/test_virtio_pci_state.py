# SPDX-License-Identifier: Apache-2.0
"""The state of a virtio PCI function as a value: another process continues from it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.backends import Recorder
from tests.fakes.echo import Echo
from tests.fakes.vfio_client import FakeClient
from tests.fakes.virtio_pci import Guest, end, make, send

from vballoon.virtio import RingFault, RingRecord
from vballoon.virtio_pci import VirtioPciFunction
from vballoon.virtio_pci.registers import QueueValue, RegistersValue
from vballoon.virtio_pci.state import FunctionValue, pack, unpack
from vballoon.virtqueue import RingState
from vfio_user import RequestError
from vfio_user.state import BaseState, IrqState
from virtio_formats.virtio import features as f
from virtio_formats.virtio.status import DeviceStatus as S

V1 = f.mask(f.VIRTIO_F_VERSION_1)
PACKED = f.mask(f.VIRTIO_F_VERSION_1, f.VIRTIO_F_RING_PACKED)


def restart(guest: Guest) -> Echo:
    """Another process serves the guest; the first one died without a step of its own."""
    data = pack(guest.function.state())
    guest.function.device.stop = lambda: None  # type: ignore[method-assign]
    guest.client.close()
    guest.function.close()
    echo = Echo()
    guest.function = VirtioPciFunction(echo, ring_features=PACKED)
    value, _ = unpack(data)
    guest.function.restore(value)
    assert guest.function.state().ran == value.ran
    guest.client = FakeClient(guest.function)
    guest.client.negotiate()
    guest.client.map(guest.ram)
    return echo


class TestRestart:
    def test_a_split_ring_continues(self) -> None:
        _, guest = make(ring_features=PACKED)
        guest.start(V1)
        send(guest, 0, b"one")
        assert len(guest.rings[0].collect()) == 1
        for turn in range(20):  # around the ring
            echo = restart(guest)
            send(guest, 0, b"%d" % turn)
            assert len(guest.rings[0].collect()) == 1
            assert echo.echoed == 1
            assert "reset" not in echo.log
        end(guest)

    def test_a_buffer_that_was_held_is_served_again(self) -> None:
        _, guest = make(ring_features=PACKED)
        guest.start(V1, (0, 1))
        send(guest, 1, b"held")
        assert guest.rings[1].collect() == []
        echo = restart(guest)
        guest.client.run()
        assert echo.held is not None, "served without a doorbell"
        echo.release()
        assert len(guest.rings[1].collect()) == 1
        end(guest)

    def test_a_packed_ring_is_stopped(self) -> None:
        _, guest = make(ring_features=PACKED)
        guest.start(PACKED)
        send(guest, 0, b"one")
        restart(guest)
        guest.client.run()
        assert guest.function.rings.record(0).broken == RingFault(
            "ring-position", "a packed ring without an in-flight record"
        )
        assert guest.get("device_status") & S.NEEDS_RESET
        end(guest)

    def test_a_reset_makes_a_ring_start_from_nothing(self) -> None:
        _, guest = make(ring_features=PACKED)
        guest.start(V1)
        send(guest, 0, b"one")
        restart(guest)
        guest.start(V1)
        send(guest, 0, b"two")
        assert len(guest.rings[0].collect()) == 1
        end(guest)


# -- the bytes -----------------------------------------------------------------------------------

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
u8 = st.integers(0, 255)
queues = st.builds(QueueValue, u64, u64, u64, u16, u16, u8, st.booleans())
records = st.builds(
    RingRecord,
    position=st.none() | st.builds(RingState, u16, u16, st.booleans(), st.booleans()),
    outstanding=u32,
    taken=u64,
    given=u64,
    notified=u64,
    kicked=u64,
    broken=st.none() | st.builds(RingFault, st.sampled_from(["head-range", ""])),
)


@st.composite
def values(draw: st.DrawFn) -> FunctionValue:
    many = tuple(draw(st.lists(queues, max_size=3)))
    return FunctionValue(
        base=BaseState(config=draw(st.binary(max_size=64)), intx=draw(st.booleans())),
        msix_table=draw(st.binary(max_size=48)),
        kept=tuple(draw(st.lists(u16, max_size=3))),
        registers=RegistersValue(
            draw(u8), draw(u64), draw(u16), draw(u32), draw(u32), draw(u16), many
        ),
        rings=tuple(draw(st.lists(records, max_size=3))),
        ran=tuple(sorted(draw(st.sets(st.sampled_from(range(len(many))))))) if many else (),
        generation=draw(u8),
        isr=draw(u8),
        change_due=draw(st.booleans()),
    )


@given(values(), st.binary(max_size=32))
@settings(max_examples=60)
def test_what_is_packed_is_unpacked(value: FunctionValue, device: bytes) -> None:
    assert unpack(pack(value, device)) == (value, device)


SAMPLE = FunctionValue(
    base=BaseState(
        config=bytes.fromhex("f41a5210"),
        irqs=(IrqState(index=2, vector=1, pending=True),),
    ),
    msix_table=bytes(range(16)),
    kept=(0,),
    registers=RegistersValue(
        15, 1 << 32, 0, 1, 1, 0, (QueueValue(0x1000, 0x2000, 0x3000, 16, 1, 1, False),)
    ),
    rings=(RingRecord(RingState(avail=3, used=2), 1, RingFault("desc-order"), taken=3),),
    generation=4,
    isr=1,
)


def test_the_packed_form_of_this_version() -> None:
    """A later version reads these bytes, or refuses them: it never misreads them."""
    assert pack(SAMPLE, b"own").hex() == VECTOR
    assert unpack(bytes.fromhex(VECTOR)) == (SAMPLE, b"own")


def test_every_corrupted_byte_is_refused() -> None:
    data = bytes.fromhex(VECTOR)
    for at in range(len(data)):
        for bad in (data[at] ^ 1, data[at] ^ 0x80, data[at] ^ 0xFF):
            with pytest.raises(RequestError) as caught:
                unpack(data[:at] + bytes([bad]) + data[at + 1 :])
            assert caught.value.errno == errno.EINVAL


def damaged(value: Any) -> Iterator[tuple[str, Any]]:
    """*value* with a single field changed, at any depth that a function checks."""
    for field in fields(value):
        for other in _others(getattr(value, field.name)):
            if other != getattr(value, field.name):
                yield f"{field.name}={other!r:.40}", replace(value, **{field.name: other})


def _others(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [0, 1, 3, 255]
    if isinstance(value, bytes):
        return [b"", value[:-1], bytes(len(value))]
    if isinstance(value, RegistersValue | BaseState):
        return [other for _, other in damaged(value)]
    if isinstance(value, tuple) and value and isinstance(value[0], QueueValue):
        return [(), value[:1], *((other, *value[1:]) for _, other in damaged(value[0]))]
    return [(), value * 2] if isinstance(value, tuple) else []


def test_every_damaged_field_is_refused_or_is_what_the_function_is_then() -> None:
    _, guest = make()
    guest.start(V1, (0, 1))
    value = guest.function.state()
    refused = 0
    for name, bad in damaged(value):
        function = VirtioPciFunction(Echo())
        before = function.state()
        try:
            function.restore(bad)
        except RequestError:
            refused += 1
            assert function.state() == before, name
        else:
            found = function.state()
            assert found.registers == bad.registers, name
            assert found.rings == bad.rings, name
        function.run_deferred()  # without a client no ring runs, whatever the registers say
        assert not function.queues
        function.close()
    assert refused >= 15
    end(guest)


def test_a_restored_function_is_equal() -> None:
    _, guest = make()
    guest.start(V1, (0, 1))
    send(guest, 0, b"x")
    value = guest.function.state()
    function = VirtioPciFunction(Echo())
    function.restore(value)
    # The driver has seen the configuration of another process, so it is notified.
    assert function.state() == replace(value, generation=value.generation + 1)
    function.close()
    end(guest)


def test_a_disconnect_names_its_reason() -> None:
    """Over vfio-user it was always the empty one, which says that the client closed in order."""
    events = Recorder()
    _, guest = make(events=events)
    guest.client.session.feed(b"\xff" * 64)
    assert not guest.client.session.is_open
    guest.client.close()
    assert events.told[0] == ("connected",)
    assert events.told[1][0] == "disconnected"
    assert events.told[1][1]
    end(guest)
    events = Recorder()
    _, guest = make(events=events)
    guest.client.close()
    assert events.told == [("connected",), ("disconnected", "")]
    end(guest)


def test_a_fault_of_the_device_leaves_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    echo, guest = make()
    guest.start(V1)
    echo.fail_with = ZeroDivisionError("oops")
    send(guest, 0, b"boom")
    assert "queue 0 stopped: internal: ZeroDivisionError: oops (echo.py:" in caplog.text
    assert "Traceback" not in caplog.text
    end(guest)


VECTOR = (
    "56425046010000004f01000097ad2a9501000000000000000100000001000000000000000f0401001e000000"
    "56465042010000000e000000998ea5fb00000400f41a52100100020101001000000000010203040506070809"
    "0a0b0c0d0e0f0100000001000010000000000000002000000000000000300000000000001000010001000000"
    "d00000000f000000030002000100000000000000030000000000000000000000000000000000000000000000"
    "0000000000000000646573632d6f726465720000000000000000000000000000000000000000000000000000"
    "0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000030000006f776e"
)
