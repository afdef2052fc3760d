# SPDX-License-Identifier: Apache-2.0
"""``vballoon.virtio_pci.state``: moving a function with running rings to another server.

vfio-user specification (QEMU 11.1), ``VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE``: what a device in
STOP_COPY gives makes another one in RESUMING that device.
"""

from __future__ import annotations

import errno
import gc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.descriptors import open_fds
from tests.fakes.echo import Echo
from tests.fakes.vfio_client import FakeClient, Ram
from tests.fakes.virtio_pci import Guest, end, make, send

from vballoon.balloon import Balloon
from vballoon.skipmap import Provenance
from vballoon.virtio import VirtioDevice
from vballoon.virtio_pci import DEFAULT_RING_FEATURES, VirtioPciFunction
from virtio_formats.vfio_user import (
    Command,
    DeviceFeature,
    DeviceState,
    Feature,
    FeatureFlags,
    MigData,
    MigState,
    PciIrq,
    PciRegion,
)
from virtio_formats.vfio_user.state import StateFrame, seal, unseal
from virtio_formats.virtio import features as f
from virtio_formats.virtio.balloon import BalloonFeature
from virtio_formats.virtio.pci_state import FUNCTION_MAGIC, FunctionBody
from virtio_formats.virtio.status import DeviceStatus as S

V1 = f.mask(f.VIRTIO_F_VERSION_1)
EVENT = V1 | f.mask(f.VIRTIO_F_EVENT_IDX)
PACKED = V1 | f.mask(f.VIRTIO_F_RING_PACKED)
KINDS = {
    "split": V1,
    "event index": EVENT,
    "packed": PACKED,
    "packed, in order": PACKED | f.mask(f.VIRTIO_F_IN_ORDER),
}
OFFERED = DEFAULT_RING_FEATURES | f.mask(f.VIRTIO_F_RING_PACKED, f.VIRTIO_F_IN_ORDER)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    gc.collect()
    before = open_fds()
    yield
    gc.collect()
    assert open_fds() == before, "descriptors leaked"


def go(client: FakeClient, state: DeviceState, *, expect: int = 0) -> None:
    flags = Feature.MIG_DEVICE_STATE | FeatureFlags.SET
    data = MigState(device_state=state, data_fd=0).build()
    request = DeviceFeature(argsz=16, flags=flags).build() + data
    client.call(Command.DEVICE_FEATURE, request, expect=expect)


def read_state(client: FakeClient, piece: int = 100) -> bytes:
    """Everything that MIG_DATA_READ gives, in small pieces."""
    found = b""
    while True:
        request = MigData(argsz=8 + piece, size=piece).build()
        part = client.call(Command.MIG_DATA_READ, request).payload[MigData.SIZE :]
        found += part
        if len(part) < piece:
            return found


def write_state(client: FakeClient, state: bytes, piece: int = 64) -> None:
    for at in range(0, len(state), piece):
        part = state[at : at + piece]
        client.call(
            Command.MIG_DATA_WRITE, MigData(argsz=8 + len(part), size=len(part)).build() + part
        )


def save(guest: Guest) -> bytes:
    go(guest.client, DeviceState.STOP_COPY)
    return read_state(guest.client)


def move(guest: Guest, device: VirtioDevice, *, mapped: bool = True, late: bool = False) -> None:
    """Stop, copy, and continue in another server.  *late*: memory is mapped after the state."""
    state = save(guest)
    target = VirtioPciFunction(device, ring_features=OFFERED)
    client = FakeClient(target)
    client.negotiate()
    if not late:
        client.map(guest.ram, mapped=mapped)
    client.assign(PciIrq.MSIX, guest.vectors)
    go(client, DeviceState.RESUMING)
    write_state(client, state)
    if late:
        go(client, DeviceState.STOP)
        client.map(guest.ram, mapped=mapped)
    guest.client.close()
    guest.function.close()
    guest.client, guest.function = client, target
    go(client, DeviceState.RUNNING)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "messages"])
def test_the_rings_go_on_where_they_stood(kind: str, mapped: bool) -> None:
    """Ten times there and back, with a buffer held and buffers that came while nobody ran."""
    _, guest = make("mapped" if mapped else "messages", OFFERED)
    guest.start(KINDS[kind], (0, 1))
    for turn in range(10):
        send(guest, 0, b"turn %d" % turn)
        assert len(guest.rings[0].collect()) == 1
        send(guest, 1, b"held")
        go(guest.client, DeviceState.STOP)
        assert len(guest.rings[1].collect()) == 1, "what is held does not travel"
        send(guest, 0, b"while it stood still", b"two of them")
        assert guest.rings[0].collect() == []
        device = Echo()
        move(guest, device, mapped=mapped, late=bool(turn % 2))
        assert len(guest.rings[0].collect()) == 2
        assert device.echoed == 2
        assert guest.function.registers.features == KINDS[kind]
    end(guest)


def test_registers_configuration_space_and_interrupts_travel() -> None:
    _, guest = make(ring_features=OFFERED)
    guest.start(EVENT, (0, 1))
    guest.client.set_config(4, 0x406, 2)
    guest.client.set_config(0x10, 0xFEBC0000, 4)
    guest.set("queue_select", 1)
    names = ("device_status", "config_msix_vector", "queue_select", "queue_size", "queue_desc",
             "queue_driver", "queue_device", "queue_enable", "queue_msix_vector")  # fmt: skip
    before = {name: guest.get(name) for name in names}
    generation = guest.get("config_generation")
    guest.interrupts()
    move(guest, Echo())
    assert {name: guest.get(name) for name in names} == before
    assert guest.get("config_generation") != generation, "the configuration may be another one"
    assert guest.client.config(4, 2) == 0x406
    assert guest.client.config(0x10, 4) == 0xFEBC0000 | 4
    send(guest, 0, b"x")
    assert guest.interrupts() == [0, 1, 0], "MSI-X is on, and the vectors are known"
    end(guest)


def test_a_pending_interrupt_is_not_lost() -> None:
    _, guest = make()
    guest.start(V1)
    guest.client.set_config(guest.msix + 2, 0xC000, 2)  # function masked
    guest.interrupts()
    send(guest, 0, b"x")
    assert guest.interrupts() == [0, 0, 0]
    move(guest, Echo())
    assert guest.interrupts() == [0, 0, 0]
    guest.client.set_config(guest.msix + 2, 0x8000, 2)
    assert guest.interrupts() == [0, 1, 0]
    end(guest)


def test_a_masked_vector_stays_masked() -> None:
    _, guest = make()
    guest.start(V1)
    control = 16 * 1 + 12  # of vector 1
    for value in (0, 1):  # a client that forwards the table
        guest.client.write(PciRegion.BAR2, control, value.to_bytes(4, "little"))
    guest.interrupts()
    move(guest, Echo())
    assert guest.client.read(PciRegion.BAR2, control, 4) == b"\1\0\0\0"
    send(guest, 0, b"x")
    assert guest.interrupts() == [0, 0, 0]
    guest.client.write(PciRegion.BAR2, control, bytes(4))
    assert guest.interrupts() == [0, 1, 0]
    end(guest)


def test_nothing_happens_while_it_stands_still() -> None:
    _, guest = make()
    guest.start(V1)
    go(guest.client, DeviceState.STOP)
    guest.interrupts()
    guest.function.config_changed()
    send(guest, 0, b"x")
    more = Ram(1 << 30, 1 << 20)
    guest.client.map(more)
    guest.client.unmap(1 << 30, 1 << 20)
    assert guest.interrupts() == [0, 0, 0]
    assert guest.rings[0].collect() == []
    go(guest.client, DeviceState.RUNNING)
    assert guest.interrupts() == [1, 1, 0]
    assert len(guest.rings[0].collect()) == 1
    more.close()
    end(guest)


def test_a_broken_queue_stays_broken_and_the_others_go_on() -> None:
    _, guest = make()
    guest.start(V1, (0, 1))
    guest.rings[1].avail[1] = 999  # type: ignore[attr-defined]
    guest.kick(1)
    assert guest.get("device_status") & S.NEEDS_RESET
    move(guest, Echo())
    assert guest.get("device_status") & S.NEEDS_RESET
    send(guest, 0, b"x")
    assert len(guest.rings[0].collect()) == 1
    assert sorted(guest.function.queues) == [0]
    end(guest)


def test_a_balloon_keeps_what_it_was_given() -> None:
    function = VirtioPciFunction(Balloon(), ring_features=OFFERED)
    guest = Guest(function)
    guest.start(V1 | int(BalloonFeature.MUST_TELL_HOST | BalloonFeature.PAGE_REPORTING), (0, 1, 2))
    page = guest.ram.address + (2 << 20) >> 12
    pages = np.arange(page, page + 8, dtype="<u4").tobytes()
    buffer = guest.rings[0].buffer(len(pages))
    guest.memory.write(buffer.addr, pages)
    guest.rings[0].add(buffer)
    guest.rings[0].publish()
    guest.kick(0)
    guest.write_config(4, (8).to_bytes(4, "little"))
    balloon = Balloon()
    move(guest, balloon, late=True)
    assert balloon.skipmap.extents(Provenance.BALLOONED).tolist() == [[page, page + 8]]
    assert guest.read_config(4, 4) == (8).to_bytes(4, "little")
    end(guest)


BAD = {
    "nothing": lambda state: b"",
    "cut in the head": lambda state: state[: StateFrame.SIZE - 1],
    "cut": lambda state: state[:-1],
    "longer": lambda state: state + b"\0",
    "magic": lambda state: b"\xff" + state[1:],
    "version": lambda state: state[:4] + b"\xff" + state[5:],
    "no queues": lambda state: changed(state, queues=[]),
    "no rings": lambda state: changed(state, rings=b""),
    "half a ring": lambda state: changed(state, rings=body(state).rings[:-1]),
    "a vector kept that is not there": lambda state: changed(state, kept=[3]),
    "another MSI-X table": lambda state: changed(state, msix=b""),
    "no base": lambda state: changed(state, base=b""),
    "a change due twice": lambda state: changed(state, change_due=2),
    "features": lambda state: changed(state, driver_features=V1 | 1 << 60),
    "status": lambda state: changed(state, device_status=4),
    "configuration vector": lambda state: changed(state, config_msix_vector=3),
    "a damaged byte": lambda state: state[:99] + bytes([state[99] ^ 1]) + state[100:],
    "a queue's vector": lambda state: with_queue(state, vector=77),
    "a queue without size": lambda state: with_queue(state, size=0),
    "a queue too large": lambda state: with_queue(state, size=65),
    "enabled twice": lambda state: with_queue(state, enable=2),
}


def body(state: bytes) -> FunctionBody:
    return FunctionBody.parse(unseal(FUNCTION_MAGIC, state))


def changed(state: bytes, **fields: object) -> bytes:
    made = body(state)
    for name, value in fields.items():
        setattr(made, name, value)
    return seal(FUNCTION_MAGIC, made.build())


def with_queue(state: bytes, **fields: int) -> bytes:
    first, *rest = body(state).queues
    return changed(state, queues=[first | fields, *rest])


@pytest.mark.parametrize("name", BAD)
def test_a_state_that_cannot_be_ours_is_refused_and_changes_nothing(name: str) -> None:
    _echo, guest = make()
    guest.start(V1)
    state = save(guest)
    go(guest.client, DeviceState.STOP)
    go(guest.client, DeviceState.RESUMING)
    write_state(guest.client, BAD[name](state))
    go(guest.client, DeviceState.RUNNING, expect=errno.EINVAL)
    guest.client.call(Command.DEVICE_RESET)  # the way out of a state that was refused
    guest.start(V1)
    send(guest, 0, b"x")
    assert len(guest.rings[0].collect()) == 1
    end(guest)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 255)), max_size=4))
def test_any_bytes_are_a_state_or_an_error(changes: list[tuple[int, int]]) -> None:
    """Whatever was taken over, the function can be reset and used."""
    _, guest = make()
    guest.start(V1)
    state = bytearray(save(guest))
    for at, value in changes:
        state[at % len(state)] = value
    go(guest.client, DeviceState.STOP)
    go(guest.client, DeviceState.RESUMING)
    write_state(guest.client, bytes(state), 4096)
    flags = Feature.MIG_DEVICE_STATE | FeatureFlags.SET
    wanted = MigState(device_state=DeviceState.RUNNING, data_fd=0).build()
    request = DeviceFeature(argsz=16, flags=flags).build() + wanted
    guest.client.post(Command.DEVICE_FEATURE, request)
    guest.kick(0)
    guest.client.call(Command.DEVICE_RESET)
    guest.start(V1)
    send(guest, 0, b"x")
    assert len(guest.rings[0].collect()) == 1
    end(guest)
