# SPDX-License-Identifier: Apache-2.0
"""Rings that are refused before they are started: sizes, addresses, alignment, positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
from tests.fakes.memory import make_memory

from vballoon.errors import QueueError
from vballoon.memory import GuestMemory
from vballoon.virtqueue import RingAddresses, RingState, make_virtqueue
from virtio_formats.virtio import features as f

MIB = 1 << 20
PACKED = f.mask(f.VIRTIO_F_RING_PACKED)
Engine = Literal["scalar", "numpy", "batch"]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = make_memory((0, MIB), (MIB, MIB))
    yield memory
    memory.close()


BAD_RINGS = [
    ("ring-size", 0, {}),
    ("ring-size", 3, {}),
    ("ring-size", 65536, {}),
    ("ring-address", 16, {"desc": 8}),
    ("ring-address", 16, {"driver": 1}),
    ("ring-address", 16, {"device": 2}),
    ("ring-address", 16, {"desc": 2 * MIB - 128}),
    ("ring-address", 16, {"driver": 1 << 40}),
    ("ring-address", 16, {"device": (1 << 64) - 4}),
]


@pytest.mark.parametrize(("rule", "size", "where"), BAD_RINGS)
@pytest.mark.parametrize("kind", ["scalar", "numpy", "batch"])
def test_split_ring_refused(
    memory: GuestMemory, kind: Engine, rule: str, size: int, where: dict[str, int]
) -> None:
    good = {"desc": 0x1000, "driver": 0x2000, "device": 0x3000}
    with pytest.raises(QueueError) as caught:
        make_virtqueue(memory, size, RingAddresses(**good | where), 0, engine=kind)
    assert caught.value.rule == rule


@pytest.mark.parametrize(
    ("rule", "size", "where"),
    [
        ("ring-size", 0, {}),
        ("ring-size", 32769, {}),
        ("ring-address", 3, {"desc": 8}),
        ("ring-address", 3, {"driver": 2}),
        ("ring-address", 3, {"device": 2}),
        ("ring-address", 3, {"desc": 2 * MIB - 32}),
    ],
)
@pytest.mark.parametrize("kind", ["scalar", "numpy", "batch"])
def test_packed_ring_refused(
    memory: GuestMemory, kind: Engine, rule: str, size: int, where: dict[str, int]
) -> None:
    good = {"desc": 0x1000, "driver": 0x2000, "device": 0x3000}
    with pytest.raises(QueueError) as caught:
        make_virtqueue(memory, size, RingAddresses(**good | where), PACKED, engine=kind)
    assert caught.value.rule == rule


@pytest.mark.parametrize("state", [RingState(avail=3), RingState(used=3), RingState(avail=-1)])
def test_packed_ring_refuses_a_position_outside(memory: GuestMemory, state: RingState) -> None:
    with pytest.raises(QueueError, match="ring-size"):
        make_virtqueue(memory, 3, RingAddresses(0x1000, 0x2000, 0x3000), PACKED, state)
