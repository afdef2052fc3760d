# SPDX-License-Identifier: Apache-2.0
"""Good drivers, any of them: every buffer is taken once, as it was made, and comes back once.

Notifications are compared with oracles that list, in the standard's words, which indices or slots
were passed.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.driver import DriverRing, Element, PackedDriver, SplitDriver, make_driver
from tests.fakes.memory import Arena, by_messages, make_memory

from vballoon.virtqueue import Engine, RingState, Virtqueue, make_virtqueue
from virtio_formats.virtio import features as f

HIGH = 1 << 32
KINDS = ["scalar", "numpy", "batch", "messages"]
PACKED = f.mask(f.VIRTIO_F_RING_PACKED)


class Pair:
    """A good driver and a device that takes and gives, with the driver's books as the oracle."""

    def __init__(self, kind: str, size: int, features: int, start: int = 0) -> None:
        self.memory = make_memory((0, 4 << 20), (HIGH, 1 << 20))
        self.driver: DriverRing = make_driver(
            self.memory, size, features, arena=Arena(0x1000, 0x80000), start=start
        )
        self.driver.arena = Arena(0x100000, 0x200000)
        state = RingState() if isinstance(self.driver, PackedDriver) else RingState(start, start)
        engine: Any = kind if kind in ("scalar", "numpy") else "batch"
        memory = by_messages(self.memory)[0] if kind == "messages" else self.memory
        self.queue: Virtqueue = make_virtqueue(
            memory, size, self.driver.addresses, self.driver.features, state, engine=engine
        )
        self.published: list[int] = []
        self.staged: list[int] = []
        self.taken: list[int] = []
        self.armed = True  # the device has asked for a notification since it last took anything

    def add(self, elements: tuple[Element, ...], indirect: bool) -> None:
        indirect = indirect and f.has(self.driver.features, f.VIRTIO_F_INDIRECT_DESC)
        if len(elements) <= self.driver.size and self.driver.room >= (
            1 if indirect else len(elements)
        ):
            self.staged.append(self.driver.add(*elements, indirect=indirect))

    def publish(self, kicks: bool = True) -> None:
        new, self.staged = self.staged, []
        self.driver.publish()
        wanted = self.driver.should_kick()
        self.published += new
        if new and self.armed:
            assert wanted, "the device waits, and the driver has no reason to kick"
            self.armed = False

    def take(self, limit: int | None) -> None:
        batch = self.queue.take(limit)
        count = len(self.published) if limit is None else min(limit, len(self.published))
        expected, self.published = self.published[:count], self.published[count:]
        assert batch.ids.tolist() == expected
        self.taken += expected
        self.armed = not expected and limit != 0
        for i, ident in enumerate(expected):
            a, b = int(batch.first[i]), int(batch.first[i + 1])
            got = zip(batch.addr[a:b], batch.len[a:b], batch.writable[a:b], strict=True)
            assert [Element(int(p), int(n), bool(w)) for p, n, w in got] == list(
                self.driver.outstanding[ident]
            )

    def give(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        ids = np.array(self.taken[:count], np.uint16)
        if not self.driver.in_order:
            rng.shuffle(ids)
        self.taken = self.taken[count:]
        written = rng.integers(1, 100, ids.size, np.uint32)
        position = self.queue.state()
        wanted = self._wanted(position, ids)
        self.queue.give(ids, written)
        assert self.queue.should_notify() is bool(wanted and ids.size)
        assert self.queue.should_notify() is False
        assert self.driver.collect() == list(zip(ids.tolist(), written.tolist(), strict=True))

    def _wanted(self, position: RingState, ids: np.ndarray) -> bool:
        """Whether the standard wants a notification once *ids* are used from *position* on."""
        d = self.driver
        if isinstance(d, SplitDriver):
            if not d.event_idx:
                return d.avail[0] == 0
            return int(d.avail[-1]) in [(position.used + i) % 65536 for i in range(ids.size)]
        assert isinstance(d, PackedDriver)
        if d.driver_event[1] != 2:
            return d.driver_event[1] == 0
        slot, wrap, passed = position.used, position.used_wrap, []
        for _ in range(sum(d._slots[int(i)] for i in ids)):
            passed.append((slot, wrap))
            slot, wrap = (slot + 1, wrap) if slot + 1 < d.size else (0, not wrap)
        return (int(d.driver_event[0]) & 0x7FFF, bool(int(d.driver_event[0]) >> 15)) in passed

    def finish(self) -> None:
        """Everything that is still somewhere goes round."""
        self.publish()
        while self.published:
            self.take(None)
        self.give(len(self.taken), 0)
        assert not self.driver.outstanding
        assert self.driver.room == self.driver.size
        assert self.queue.outstanding == 0
        self.memory.close()


ELEMENT = st.builds(
    Element, st.integers(0, (4 << 20) - 5000), st.sampled_from([0, 1, 16, 4096, 5000])
)


@st.composite
def buffers(draw: st.DrawFn) -> tuple[Element, ...]:
    found = draw(st.lists(ELEMENT, min_size=1, max_size=6))
    split = draw(st.integers(0, len(found)))
    return tuple(e._replace(writable=i >= split) for i, e in enumerate(found))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), buffers(), st.booleans()),
        st.tuples(st.just("burst"), buffers(), st.booleans(), st.integers(2, 70)),
        st.just(("publish",)),
        st.tuples(st.just("take"), st.one_of(st.none(), st.integers(0, 20))),
        st.tuples(st.just("give"), st.integers(1, 70), st.integers(0, 1000)),
        st.tuples(st.just("interrupts"), st.booleans()),
    ),
    max_size=50,
)


def run(pair: Pair, steps: list[tuple[Any, ...]]) -> None:
    for name, *args in steps:
        if name == "burst":
            for _ in range(args[2]):
                pair.add(*args[:2])
        elif name == "interrupts":
            pair.driver.interrupts(*args)
        else:
            getattr(pair, name)(*args)
    pair.finish()


BITS = st.sets(
    st.sampled_from([f.VIRTIO_F_INDIRECT_DESC, f.VIRTIO_F_EVENT_IDX, f.VIRTIO_F_IN_ORDER])
).map(lambda bits: f.mask(*bits))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(st.sampled_from([1, 2, 8, 64]), BITS, st.sampled_from([0, 65500, 65535]), STEPS)
def test_split(kind: str, size: int, bits: int, start: int, steps: list[tuple[Any, ...]]) -> None:
    run(Pair(kind, size, bits, start), steps)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(st.sampled_from([1, 2, 3, 7, 8, 48, 65]), BITS, STEPS)
def test_packed(kind: str, size: int, bits: int, steps: list[tuple[Any, ...]]) -> None:
    run(Pair(kind, size, bits | PACKED), steps)


@pytest.mark.parametrize("kind", ["scalar", "batch"])
@pytest.mark.parametrize("bits", [0, PACKED, f.mask(f.VIRTIO_F_EVENT_IDX)])
def test_indices_wrap_at_65536(kind: str, bits: int) -> None:
    """70000 buffers through a queue of 256: every index and wrap counter goes round."""
    pair = Pair(kind, 256, bits)
    element = (Element(0x100000, 8, True),)
    for _ in range(275):
        for _ in range(255):  # not the queue's size, so that positions shift
            pair.add(element, False)
        pair.publish()
        batch = pair.queue.take()
        assert batch.ids.tolist() == pair.published
        pair.queue.give(batch.ids, np.ones(255, np.uint32))
        assert [i for i, _ in pair.driver.collect()] == pair.published
        pair.published = []
    pair.memory.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [0, PACKED])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_chain_exactly_as_long_as_the_queue(kind: str, features: int, count: int) -> None:
    pair = Pair(kind, 16, features | f.mask(f.VIRTIO_F_INDIRECT_DESC))
    for indirect in (False, True):
        for _ in range(16 // count if not indirect else 1):
            pair.add((Element(0x100000, 8),) * (16 if indirect else count), indirect)
        pair.publish()
        pair.take(None)
        pair.give(len(pair.taken), 0)
    pair.finish()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [0, PACKED])
def test_table_at_an_odd_address_across_two_regions(kind: str, features: int) -> None:
    memory = make_memory((0, 1 << 20), (1 << 20, 1 << 20))
    d = make_driver(memory, 16, features | f.mask(f.VIRTIO_F_INDIRECT_DESC))
    other = by_messages(memory)[0] if kind == "messages" else memory
    engine = cast("Engine", kind if kind in ("scalar", "numpy") else "batch")
    q = make_virtqueue(other, 16, d.addresses, d.features, engine=engine)
    elements = tuple(Element(0x8000 + 8 * i, 8, i > 3) for i in range(9))
    d.arena.end = 2 << 20
    for table in ((1 << 20) - 24, (1 << 20) - 67, 0x70001, (1 << 20) + 1):
        d.arena.next = table
        head = d.add(*elements, indirect=True)
        d.publish()
        batch = q.take()
        assert batch.ids.tolist() == [head]
        assert batch.addr.tolist() == [e.addr for e in elements]
        assert batch.writable.tolist() == [e.writable for e in elements]
        q.give(batch.ids, np.zeros(1, np.uint32))
        d.collect()
    memory.close()


@pytest.mark.parametrize("kind", KINDS)
def test_normal_descriptors_followed_by_a_table(kind: str) -> None:
    """Unusual and valid (… / Indirect Descriptors, device requirements); WRITE on it is ignored."""
    pair = Pair(kind, 64, f.mask(f.VIRTIO_F_INDIRECT_DESC))
    d = pair.driver
    assert isinstance(d, SplitDriver)
    heads = []
    for _ in range(20):
        table = d.arena.take(32)
        d.write_table(table, (Element(0x100000, 8), Element(0x100000, 9, True)))
        slots = [d.free.popleft() for _ in range(3)]
        d.desc[slots[0]] = (0x100000, 5, 1, slots[1])
        d.desc[slots[1]] = (0x100000, 6, 1, slots[2])
        d.desc[slots[2]] = (table, 32, 4 | 2, 0)
        heads.append(d.offer(slots))
    d.publish()
    batch = pair.queue.take()
    assert batch.ids.tolist() == heads
    assert batch.len.tolist() == [5, 6, 8, 9] * 20
    assert batch.writable.tolist() == [False, False, False, True] * 20
    pair.queue.give(batch.ids, np.zeros(20, np.uint32))
    assert len(d.collect()) == 20
    assert d.room == 64
    pair.memory.close()


@pytest.mark.parametrize("kind", KINDS)
def test_table_that_is_not_in_order_and_larger_than_its_chain(kind: str) -> None:
    """The entries of a split table follow their next fields, not their places."""
    pair = Pair(kind, 8, f.mask(f.VIRTIO_F_INDIRECT_DESC))
    d = pair.driver
    assert isinstance(d, SplitDriver)
    table = d.arena.take(16 * 20)
    rows = np.zeros(20, d.desc.dtype)
    rows[0], rows[17], rows[3] = (0x100000, 1, 1, 17), (0x100000, 2, 1, 3), (0x100000, 3, 2, 9)
    d.memory.write(table, rows.tobytes())
    slot = d.free.popleft()
    d.desc[slot] = (table, 16 * 20, 4, 0)
    d.offer([slot])
    d.publish()
    assert pair.queue.take().len.tolist() == [1, 2, 3]
    pair.memory.close()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_id_above_the_queue_size(kind: str) -> None:
    """A buffer id is the driver's own business, up to 16 bits."""
    pair = Pair(kind, 16, PACKED)
    d = pair.driver
    assert isinstance(d, PackedDriver)
    for ident in (65535, 7, 16):
        d.write_list([(0x100000, 8, 1), (0x100000, 8, 0)], ident)
    d.publish()
    batch = pair.queue.take()
    assert batch.ids.tolist() == [65535, 7, 16]
    pair.queue.give(batch.ids[::-1].copy(), np.zeros(3, np.uint32))
    assert d.desc["id"][[0, 2, 4]].tolist() == [16, 7, 65535]
    pair.memory.close()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_table_ignores_flags_and_ids(kind: str) -> None:
    """Only WRITE counts in a packed indirect table, NEXT and INDIRECT are ignored."""
    pair = Pair(kind, 16, PACKED | f.mask(f.VIRTIO_F_INDIRECT_DESC))
    d = pair.driver
    head = d.add(Element(0x100000, 8), Element(0x100000, 9), indirect=True)
    table = d.arena.next - 32
    d.memory.write(table + 12, bytes([9, 9, 1 | 4, 0xFF]))
    d.memory.write(table + 28, bytes([8, 8, 2 | 4, 0xFF]))
    d.publish()
    batch = pair.queue.take()
    assert batch.ids.tolist() == [head]
    assert batch.writable.tolist() == [False, True]
    pair.memory.close()
