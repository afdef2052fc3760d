# SPDX-License-Identifier: Apache-2.0
"""Malformed rings: each stops the queue and names the rule that it breaks, in both engines.

Every case runs alone and after good buffers, which must be used first.  The cases are bugs that
real devices have had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, cast

import numpy as np
import pytest
from tests.fakes.driver import (
    INDIRECT,
    NEXT,
    DriverRing,
    Element,
    PackedDriver,
    SplitDriver,
    make_driver,
)
from tests.fakes.memory import by_messages, make_memory

from vballoon.errors import QueueError
from vballoon.memory import GuestMemory
from vballoon.virtqueue import RULES, ChainBatch, RingState, make_virtqueue
from vballoon.virtqueue.base import Virtqueue
from virtio_formats.virtio import features as f

MIB = 1 << 20
HIGH = 1 << 32
BOTH_INDIRECT = f.mask(f.VIRTIO_F_INDIRECT_DESC)
PACKED = f.mask(f.VIRTIO_F_RING_PACKED)
Engine = Literal["scalar", "numpy", "batch"]


@pytest.fixture(params=["scalar", "numpy", "batch", "messages"])
def engine(request: pytest.FixtureRequest) -> str:
    """Name an engine; ``messages`` is the scalar one over memory accessed by messages only."""
    return str(request.param)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = make_memory((0, MIB), (MIB, MIB), (HIGH, MIB))
    yield memory
    memory.close()


def queue_of(engine: str, driver: DriverRing) -> Virtqueue:
    memory = driver.memory if engine != "messages" else by_messages(driver.memory)[0]
    kind = cast("Engine", engine if engine in ("scalar", "numpy") else "batch")
    return make_virtqueue(
        memory,
        driver.size,
        driver.addresses,
        driver.features,
        RingState(driver.next_avail, driver.next_avail)
        if isinstance(driver, SplitDriver)
        else None,
        engine=kind,
    )


def ids(batch: ChainBatch) -> list[int]:
    return batch.ids.tolist()


# split: each fault makes one bad buffer on a ring of 16


def loop(d: SplitDriver) -> None:
    head = d.add(d.buffer(8), d.buffer(8))
    tail = int(d.desc["next"][head])
    d.desc["flags"][tail], d.desc["next"][tail] = NEXT, head


def loop_to_itself(d: SplitDriver) -> None:
    head = d.add(d.buffer(8))
    d.desc["flags"][head], d.desc["next"][head] = NEXT, head


def loop_of_nothing(d: SplitDriver) -> None:
    head = d.add(Element(0, 0))
    d.desc["flags"][head], d.desc["next"][head] = NEXT, head


def loop_in_table(d: SplitDriver) -> None:
    head = d.add(d.buffer(8), d.buffer(8), indirect=True)
    table = int(d.desc["addr"][head])
    d.memory.write(table + 16 + 12, bytes([NEXT, 0, 0, 0]))


def next_out_of_range(d: SplitDriver) -> None:
    head = d.add(d.buffer(8))
    d.desc["flags"][head], d.desc["next"][head] = NEXT, d.size


def next_far_out_of_range(d: SplitDriver) -> None:
    head = d.add(d.buffer(8))
    d.desc["flags"][head], d.desc["next"][head] = NEXT, 0xFFFF


def next_out_of_table(d: SplitDriver) -> None:
    head = d.add(d.buffer(8), d.buffer(8), indirect=True)
    d.memory.write(int(d.desc["addr"][head]) + 14, bytes([2, 0]))


def head_out_of_range(d: SplitDriver) -> None:
    head = d.add(d.buffer(8))
    d.avail_ring[(d.next_avail - 1) % d.size] = d.size
    del d.outstanding[head]


def head_way_out_of_range(d: SplitDriver) -> None:
    d.add(d.buffer(8))
    d.avail_ring[(d.next_avail - 1) % d.size] = 0xFFFF


def head_twice(d: SplitDriver) -> None:
    head = d.add(d.buffer(8))
    d.publish()
    d.avail_ring[d.next_avail % d.size] = head
    d.next_avail = (d.next_avail + 1) % 65536


def descriptor_in_two_chains(d: SplitDriver) -> None:
    """Make sixteen heads available, each chained through all descriptors after it."""
    slots = list(d.free)
    for slot, after in zip(slots, slots[1:] + slots[:1], strict=True):
        d.desc[slot] = (0x8000, 8, NEXT, after)
    d.desc["flags"][slots[-1]] = 0
    for slot in slots:
        d.offer([slot])


def bad_address(addr: int, length: int) -> Callable[[DriverRing], None]:
    def fault(d: DriverRing) -> None:
        d.add(Element(addr, length, True))

    return fault


def second_bad(addr: int, length: int) -> Callable[[DriverRing], None]:
    def fault(d: DriverRing) -> None:
        d.add(d.buffer(8), Element(addr, length, True))

    return fault


def in_table(*elements: Element) -> Callable[[DriverRing], None]:
    def fault(d: DriverRing) -> None:
        d.add(*elements, indirect=True)

    return fault


def direct(*elements: Element) -> Callable[[DriverRing], None]:
    def fault(d: DriverRing) -> None:
        d.add(*elements)

    return fault


def table_of(
    length: int, addr: int = 0x9000, flags: int = INDIRECT
) -> Callable[[DriverRing], None]:
    """Return a fault: a descriptor that claims to be a table of *length* bytes."""

    def fault(d: DriverRing) -> None:
        if isinstance(d, SplitDriver):
            head = d.add(Element(addr, length))
            d.desc["flags"][head] = INDIRECT
        elif isinstance(d, PackedDriver):
            d.write_list([(addr, length, INDIRECT)], d.free_ids.popleft())

    return fault


def table_then_next(d: DriverRing) -> None:
    """Set INDIRECT and NEXT in one descriptor, whose next descriptor is valid."""
    if isinstance(d, SplitDriver):
        head = d.add(d.buffer(16), d.buffer(8))
        d.desc["flags"][head] = INDIRECT | NEXT
    elif isinstance(d, PackedDriver):
        d.write_list([(0x9000, 16, INDIRECT | NEXT), (0x9000, 8, 0)], d.free_ids.popleft())


def nested(d: SplitDriver) -> None:
    head = d.add(d.buffer(16), indirect=True)
    d.memory.write(int(d.desc["addr"][head]) + 12, bytes([INDIRECT]))


def table_at_chain_end_nested(d: SplitDriver) -> None:
    nested(d)
    head = next(reversed(d.outstanding))
    table = int(d.desc["addr"][head])
    d.avail_ring[(d.next_avail - 1) % d.size] = d.free[0]
    d.desc[d.free[0]] = (0x9000, 8, NEXT, head)
    assert table


READ, FILL = Element(0x9000, 8), Element(0x9000, 8, True)
HUGE = Element(0, 0xFFFFFFFF)

COMMON: dict[str, tuple[str, Callable[..., None]]] = {
    "address beyond memory": ("desc-address", bad_address(1 << 40, 8)),
    "address in the hole": ("desc-address", bad_address(2 * MIB, 8)),
    "end of buffer in the hole": ("desc-address", bad_address(2 * MIB - 8, 16)),
    "address plus length wraps": ("desc-address", bad_address((1 << 64) - 8, 16)),
    "address plus length wraps to inside": ("desc-address", bad_address((1 << 64) - 16, 0x2000)),
    "across the hole": ("desc-address", bad_address(MIB, 0xFFFFFFFF)),
    "empty buffer outside memory": ("desc-address", bad_address(1 << 40, 0)),
    "second descriptor outside": ("desc-address", second_bad(1 << 40, 8)),
    "readable after writable": ("desc-order", direct(FILL, READ)),
    "readable after empty writable": ("desc-order", direct(FILL._replace(len=0), READ)),
    "readable between writables": ("desc-order", direct(FILL, READ, FILL)),
    "readable after writable in a table": ("desc-order", in_table(READ, FILL, READ)),
    "bad address in a table": ("desc-address", in_table(READ, Element(1 << 40, 8))),
    "table of no bytes": ("indirect-size", table_of(0)),
    "table of 8 bytes": ("indirect-size", table_of(8)),
    "table of 17 bytes": ("indirect-size", table_of(17)),
    "table of 2^32 - 1 bytes": ("indirect-size", table_of(0xFFFFFFFF)),
    "table outside memory": ("indirect-address", table_of(16, 1 << 40)),
    "table ends outside memory": ("indirect-address", table_of(32, 2 * MIB - 16)),
    "table wraps": ("indirect-address", table_of(32, (1 << 64) - 16)),
    "table and next": ("indirect-with-next", table_then_next),
    "chain of one more than the queue, by table": ("chain-too-long", in_table(*[READ] * 17)),
}

SPLIT: dict[str, tuple[str, Callable[..., None]]] = COMMON | {
    "loop": ("desc-chain-loop", loop),
    "loop to itself": ("desc-chain-loop", loop_to_itself),
    "loop of zero lengths": ("desc-chain-loop", loop_of_nothing),
    "loop in a table": ("desc-chain-loop", loop_in_table),
    "next out of range": ("desc-next-range", next_out_of_range),
    "next far out of range": ("desc-next-range", next_far_out_of_range),
    "next out of the table": ("desc-next-range", next_out_of_table),
    "head out of range": ("head-range", head_out_of_range),
    "head way out of range": ("head-range", head_way_out_of_range),
    "table in a table": ("indirect-nested", nested),
    "table in a table after a chain": ("indirect-nested", table_at_chain_end_nested),
}


def unavailable_tail(d: PackedDriver) -> None:
    """Write a chain that continues in a slot that the driver has not made available."""
    d.write_list([(0x9000, 8, NEXT)], d.free_ids.popleft())


def id_twice(d: PackedDriver) -> None:
    first = d.free_ids.popleft()
    d.write_list([(0x9000, 8, 0)], first)
    d.write_list([(0x9000, 8, 0)], first)


PACKED_CASES: dict[str, tuple[str, Callable[..., None]]] = COMMON | {
    "list continues in what is not available": ("desc-not-available", unavailable_tail),
    "table after a descriptor": (
        "indirect-with-next",
        lambda d: d.write_list([(0x9000, 8, NEXT), (0x9000, 16, INDIRECT)], d.free_ids.popleft()),
    ),
}


def check(d: DriverRing, engine: str, before: int, rule: str, fault: Callable[..., None]) -> None:
    """Check that good buffers are taken, then each take names the rule and changes nothing."""
    q = queue_of(engine, d)
    good = [d.add(d.buffer(8, writable=i % 2 == 0)) for i in range(before)]
    fault(d)
    d.publish()
    if good:
        batch = q.take()
        assert ids(batch) == good
        assert q.outstanding == len(good)
    state = q.state()
    for _ in range(2):
        with pytest.raises(QueueError) as caught:
            q.take()
        assert caught.value.rule == rule
        assert rule in RULES
        assert q.state() == state
    if good:
        q.give(batch.ids, np.zeros(len(good), np.uint32))
        assert [i for i, _ in d.collect()] == good
    assert q.outstanding == 0


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("case", SPLIT)
def test_split_fault(memory: GuestMemory, engine: str, case: str, before: int) -> None:
    d = make_driver(memory, 16, BOTH_INDIRECT)
    check(d, engine, before, *SPLIT[case])


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("case", PACKED_CASES)
def test_packed_fault(memory: GuestMemory, engine: str, case: str, before: int) -> None:
    d = make_driver(memory, 16, BOTH_INDIRECT | PACKED)
    check(d, engine, before, *PACKED_CASES[case])


@pytest.mark.parametrize("before", [40, 100])
@pytest.mark.parametrize("case", SPLIT)
def test_split_fault_after_many_good_buffers(
    memory: GuestMemory, engine: str, case: str, before: int
) -> None:
    d = make_driver(memory, 128, BOTH_INDIRECT)
    rule, fault = SPLIT[case]
    if rule == "chain-too-long":
        fault = in_table(*[READ] * 129)
    check(d, engine, before, rule, fault)


@pytest.mark.parametrize("case", SPLIT)
def test_split_fault_after_longer_chains(memory: GuestMemory, engine: str, case: str) -> None:
    """Twelve chains of three, which the engine follows in one batch, precede the bad one."""
    d = make_driver(memory, 64, BOTH_INDIRECT)
    rule, fault = SPLIT[case]
    if rule == "chain-too-long":
        fault = in_table(*[READ] * 65)
    q = queue_of(engine, d)
    good = [d.add(*[d.buffer(8)] * 3) for _ in range(12)]
    fault(d)
    d.publish()
    assert ids(q.take()) == good
    with pytest.raises(QueueError) as caught:
        q.take()
    assert caught.value.rule == rule


def many_bad_next(d: SplitDriver) -> None:
    for _ in range(12):
        next_out_of_range(d)


def test_many_chains_with_a_bad_next(memory: GuestMemory, engine: str) -> None:
    d = make_driver(memory, 64)
    check(d, engine, 3, "desc-next-range", many_bad_next)


@pytest.mark.parametrize(("size", "good", "bad"), [(16, 1, 1), (128, 2, 9)])
def test_chain_and_table_together_longer_than_the_queue(
    memory: GuestMemory, engine: str, size: int, good: int, bad: int
) -> None:
    d = make_driver(memory, size, BOTH_INDIRECT)
    assert isinstance(d, SplitDriver)
    q = queue_of(engine, d)
    entries = size - 6
    for direct_ones in [6] * good + [7] * bad:
        table = d.arena.take(16 * entries)
        d.write_table(table, (READ,) * entries)
        slots = [d.free.popleft() for _ in range(direct_ones + 1)]
        for slot, after in pairwise(slots):
            d.desc[slot] = (0x9000, 8, NEXT, after)
        d.desc[slots[-1]] = (table, 16 * entries, INDIRECT, 0)
        d.offer(slots)
    d.publish()
    assert q.take().first.tolist() == [size * i for i in range(good + 1)]
    with pytest.raises(QueueError, match="chain-too-long"):
        q.take()


@pytest.mark.parametrize("format_", [0, PACKED])
def test_indirect_without_negotiation(memory: GuestMemory, engine: str, format_: int) -> None:
    d = make_driver(memory, 16, format_)
    check(d, engine, 2, "indirect-not-negotiated", table_of(16))


def test_head_made_available_twice_at_once(memory: GuestMemory, engine: str) -> None:
    d = make_driver(memory, 16)
    assert isinstance(d, SplitDriver)
    q = queue_of(engine, d)
    head_twice(d)
    d.publish()
    assert len(q.take()) == 1
    with pytest.raises(QueueError, match="buffer-reused"):
        q.take()


def test_head_still_outstanding_made_available_again(memory: GuestMemory, engine: str) -> None:
    d = make_driver(memory, 16)
    assert isinstance(d, SplitDriver)
    q = queue_of(engine, d)
    head = d.add(d.buffer(8))
    d.publish()
    assert ids(q.take()) == [head]
    other = d.add(d.buffer(8))
    d.offer([head])
    d.publish()
    assert ids(q.take()) == [other]
    with pytest.raises(QueueError, match="buffer-reused"):
        q.take()


@pytest.mark.parametrize("size", [16, 128])
def test_chains_that_share_descriptors_cannot_multiply_the_work(
    memory: GuestMemory, engine: str, size: int
) -> None:
    d = make_driver(memory, size)
    assert isinstance(d, SplitDriver)
    q = queue_of(engine, d)
    descriptor_in_two_chains(d)
    d.publish()
    assert len(q.take()) == 1  # the first has all descriptors of the ring
    with pytest.raises(QueueError, match=r"buffer-reused|ring-overrun"):
        q.take()


@pytest.mark.parametrize("jump", [17, 1000, 0x8000, 0xFFFF])
@pytest.mark.parametrize("start", [0, 65530])
def test_available_index_jumps(memory: GuestMemory, engine: str, jump: int, start: int) -> None:
    d = make_driver(memory, 16, start=start)
    assert isinstance(d, SplitDriver)
    q = queue_of(engine, d)
    d.avail[1] = (start + jump) % 65536
    with pytest.raises(QueueError, match="avail-idx-jump"):
        q.take()


def test_packed_id_made_available_twice(memory: GuestMemory, engine: str) -> None:
    d = make_driver(memory, 16, PACKED)
    assert isinstance(d, PackedDriver)
    q = queue_of(engine, d)
    id_twice(d)
    d.publish()
    assert len(q.take()) == 1
    with pytest.raises(QueueError, match="buffer-reused"):
        q.take()


@pytest.mark.parametrize("size", [1, 3, 16])
def test_packed_ring_overrun(memory: GuestMemory, engine: str, size: int) -> None:
    """A driver that fills the ring and continues is one lap ahead of the device."""
    d = make_driver(memory, size, PACKED)
    assert isinstance(d, PackedDriver)
    q = queue_of(engine, d)
    for _ in range(size):
        d.add(d.buffer(8))
    d.publish()
    assert len(q.take()) == size
    d.write_list([(0x9000, 8, 0)], 100)
    d.publish()
    with pytest.raises(QueueError, match="ring-overrun"):
        q.take()


def test_packed_ring_of_nothing_but_next_does_not_spin(memory: GuestMemory, engine: str) -> None:
    """All descriptors are available and have NEXT: the walk must end (class of CVE-2026-16457)."""
    d = make_driver(memory, 16, PACKED)
    assert isinstance(d, PackedDriver)
    q = queue_of(engine, d)
    d.desc["flags"] = 0x80 | NEXT
    with pytest.raises(QueueError, match="chain-too-long"):
        q.take()
    d.desc["flags"] = 0x80 | 0x8000 | NEXT  # used, not available: nothing there
    assert len(q.take()) == 0


@pytest.mark.parametrize("format_", [0, PACKED])
def test_chain_of_more_than_four_gigabytes(engine: str, format_: int) -> None:
    memory = make_memory((0, MIB), (HIGH, 5 << 30))
    big = Element(HIGH, 0x80000000)
    d = make_driver(memory, 16, format_ | BOTH_INDIRECT)
    q = queue_of(engine, d)
    fine = d.add(big, big, indirect=True)  # 2^32 exactly
    d.add(big, big, Element(HIGH, 1), indirect=True)
    d.publish()
    assert ids(q.take()) == [fine]
    with pytest.raises(QueueError, match="desc-length-overflow"):
        q.take()
    memory.close()
