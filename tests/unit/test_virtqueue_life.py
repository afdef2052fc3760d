# SPDX-License-Identifier: Apache-2.0
"""The life of a queue outside the common path: misuse, stop and restart, crashes, dirty log.

Also what a queue must not do: read guest memory twice, or lose or repeat a notification.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
from tests.fakes.driver import DriverRing, Element, PackedDriver, SplitDriver, make_driver
from tests.fakes.memory import by_messages, make_memory

from vballoon.errors import QueueError, UsageError
from vballoon.memory import BitmapLog, GuestMemory
from vballoon.virtqueue import Resubmit, RingState, Virtqueue, make_virtqueue
from virtio_formats.virtio import features as f

Engine = Literal["scalar", "numpy", "batch"]
PACKED = f.mask(f.VIRTIO_F_RING_PACKED)
EVENT = f.mask(f.VIRTIO_F_EVENT_IDX)
IN_ORDER = f.mask(f.VIRTIO_F_IN_ORDER)


@pytest.fixture(params=["scalar", "numpy", "batch"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = make_memory((0, 4 << 20))
    yield memory
    memory.close()


def make(memory: GuestMemory, d: DriverRing, engine: Engine, **kwargs: Any) -> Virtqueue:
    return make_virtqueue(memory, d.size, d.addresses, d.features, engine=engine, **kwargs)


def fill(d: DriverRing, count: int) -> list[int]:
    ids = [d.add(d.buffer(8, writable=True)) for _ in range(count)]
    d.publish()
    return ids


def zeros(count: int) -> np.ndarray:
    return np.zeros(count, np.uint32)


def u16(*ids: int) -> np.ndarray:
    return np.array(ids, np.uint16)


# misuse by the device


@pytest.mark.parametrize("features", [0, PACKED])
@pytest.mark.parametrize("wrong", [(9,), (0, 0), (0, 1, 9), (60000,)])
def test_giving_what_is_not_outstanding_changes_nothing(
    memory: GuestMemory, engine: Engine, features: int, wrong: tuple[int, ...]
) -> None:
    d = make_driver(memory, 16, features)
    q = make(memory, d, engine)
    ids = fill(d, 4)
    assert q.take().ids.tolist() == ids
    before = memory.read(0x10000, 0x1000)
    with pytest.raises(UsageError):
        q.give(u16(*wrong), zeros(len(wrong)))
    assert memory.read(0x10000, 0x1000) == before
    assert q.outstanding == 4
    q.give(u16(*ids), zeros(4))
    assert [i for i, _ in d.collect()] == ids


def test_a_length_for_each_buffer(memory: GuestMemory, engine: Engine) -> None:
    d = make_driver(memory, 16)
    q = make(memory, d, engine)
    fill(d, 2)
    q.take()
    with pytest.raises(UsageError):
        q.give(u16(0, 1), zeros(1))


@pytest.mark.parametrize("features", [IN_ORDER, IN_ORDER | PACKED])
def test_in_order_rings_refuse_another_order(
    memory: GuestMemory, engine: Engine, features: int
) -> None:
    d = make_driver(memory, 8, features)
    q = make(memory, d, engine)
    for _ in range(3):  # across the end of the ring
        a, b, c = fill(d, 3)
        q.take(2)
        q.take()
        with pytest.raises(UsageError):
            q.give(u16(b), zeros(1))
        with pytest.raises(UsageError):
            q.give(u16(a, c), zeros(2))
        q.give(u16(a), zeros(1))
        q.give(u16(b, c), zeros(2))
        assert [i for i, _ in d.collect()] == [a, b, c]


def test_giving_nothing_is_nothing(memory: GuestMemory, engine: Engine) -> None:
    q = make(memory, make_driver(memory, 8), engine)
    q.give(u16(), zeros(0))
    assert q.should_notify() is False
    assert len(q.take(0)) == 0


# notifications, the cases that went wrong elsewhere


@pytest.mark.parametrize("start", [0, 100, 65533, 65534, 65535])
def test_used_event_off_by_none(memory: GuestMemory, engine: Engine, start: int) -> None:
    """The notification comes with the element whose index is used_event: not one early or late."""
    for offset in range(-2, 6):
        d = make_driver(memory, 8, EVENT, start=start)
        assert isinstance(d, SplitDriver)
        q = make(memory, d, engine, state=RingState(start, start))
        fill(d, 4)
        ids = q.take().ids
        d.avail[-1] = (start + offset) % 65536
        seen = []
        for i in ids:
            q.give(u16(i), zeros(1))
            seen.append(q.should_notify())
        assert seen == [offset == i for i in range(4)]


def test_used_event_when_a_batch_passes_it(memory: GuestMemory, engine: Engine) -> None:
    for offset in range(-2, 6):
        d = make_driver(memory, 8, EVENT)
        assert isinstance(d, SplitDriver)
        q = make(memory, d, engine)
        fill(d, 4)
        batch = q.take()
        d.avail[-1] = offset % 65536
        q.give(batch.ids, zeros(4))
        assert q.should_notify() is (0 <= offset < 4)


def test_without_event_idx_used_event_is_ignored_and_the_flag_obeyed(
    memory: GuestMemory, engine: Engine
) -> None:
    d = make_driver(memory, 8)
    assert isinstance(d, SplitDriver)
    q = make(memory, d, engine)
    d.avail[-1] = 77
    for flag, wanted in ((0, True), (1, False), (0, True)):
        d.avail[0] = flag
        fill(d, 1)
        q.give(q.take().ids, zeros(1))
        assert q.should_notify() is wanted
        d.collect()


def test_with_event_idx_the_flag_is_ignored(memory: GuestMemory, engine: Engine) -> None:
    d = make_driver(memory, 8, EVENT)
    assert isinstance(d, SplitDriver)
    q = make(memory, d, engine)
    d.avail[0], d.avail[-1] = 1, 0
    fill(d, 1)
    q.give(q.take().ids, zeros(1))
    assert q.should_notify() is True


@pytest.mark.parametrize("size", [3, 8])
def test_packed_event_at_every_slot_of_two_rounds(
    memory: GuestMemory, engine: Engine, size: int
) -> None:
    """Also after the used position has wrapped, where devices have lost the interrupt."""
    for event in range(2 * size):
        d = make_driver(memory, size, PACKED | EVENT)
        assert isinstance(d, PackedDriver)
        q = make(memory, d, engine)
        d.driver_event[0] = event % size | (event < size) << 15
        d.driver_event[1] = 2
        seen = []
        for _ in range(2 * size):
            fill(d, 1)
            q.give(q.take().ids, zeros(1))
            seen.append(q.should_notify())
            d.collect()
        assert seen == [i == event for i in range(2 * size)]


@pytest.mark.parametrize(("mode", "wanted"), [(0, True), (1, False), (3, True), (0xFFFC, True)])
def test_packed_event_modes(memory: GuestMemory, engine: Engine, mode: int, wanted: bool) -> None:
    d = make_driver(memory, 8, PACKED)
    assert isinstance(d, PackedDriver)
    q = make(memory, d, engine)
    d.driver_event[1] = mode
    fill(d, 1)
    q.give(q.take().ids, zeros(1))
    assert q.should_notify() is wanted


@pytest.mark.parametrize("features", [0, EVENT, PACKED, PACKED | EVENT])
def test_kicks_off_and_on(memory: GuestMemory, engine: Engine, features: int) -> None:
    d = make_driver(memory, 8, features)
    q = make(memory, d, engine)
    assert q.enable_kicks() is False
    fill(d, 1)
    assert d.should_kick()
    assert q.enable_kicks() is True  # something slipped in
    q.take()
    q.disable_kicks()
    assert len(q.take()) == 0
    fill(d, 1)
    assert not d.should_kick()
    q.take()
    assert q.enable_kicks() is False
    fill(d, 1)
    assert d.should_kick()


@pytest.mark.parametrize("features", [0, EVENT, PACKED, PACKED | EVENT])
def test_a_backend_that_died_with_kicks_off_is_not_deaf_for_ever(
    memory: GuestMemory, engine: Engine, features: int
) -> None:
    d = make_driver(memory, 8, features)
    make(memory, d, engine).disable_kicks()
    make(memory, d, engine)
    fill(d, 1)
    assert d.should_kick()


# stopping and continuing


@pytest.mark.parametrize("features", [0, EVENT, PACKED, PACKED | EVENT])
def test_a_stopped_ring_goes_on_where_it_was(
    memory: GuestMemory, engine: Engine, features: int
) -> None:
    d = make_driver(memory, 7 if features & PACKED else 8, features)
    state = None
    for _ in range(30):
        q = make(memory, d, engine, state=state)
        ids = fill(d, 5)
        batch = q.take()
        assert batch.ids.tolist() == ids
        q.give(batch.ids, zeros(5))
        assert [i for i, _ in d.collect()] == ids
        state = q.state()
    expected = (150, True) if not features & PACKED else (150 % 7, 150 // 7 % 2 == 0)
    assert (state.avail, state.avail_wrap) == expected
    assert (state.used, state.used_wrap) == expected


# crashes


class Record:
    """An in-flight record that only records its calls."""

    def __init__(self) -> None:
        self.taken: dict[int, bytes] = {}
        self.events: list[Any] = []

    def on_take(self, ids: np.ndarray, slots: np.ndarray, ring: np.ndarray | None) -> None:
        assert slots.dtype == np.uint16
        rows = np.split(ring, np.cumsum(slots)[:-1]) if ring is not None else [None] * ids.size
        for ident, row in zip(ids.tolist(), rows, strict=True):
            self.taken[ident] = b"" if row is None else row.tobytes()
        self.events.append(("take", ids.tolist(), slots.tolist()))

    def before_give(self, ids: np.ndarray) -> None:
        self.events.append(("before", ids.tolist(), self.index()))

    def after_give(self, ids: np.ndarray, state: RingState) -> None:
        self.events.append(("after", ids.tolist(), self.index(), state.used))
        for ident in ids.tolist():
            del self.taken[ident]

    def index(self) -> int | None:
        """Return the used index as the driver sees it now."""
        return None

    def resubmit(self, d: DriverRing) -> Resubmit:
        ids = u16(*self.taken)
        if isinstance(d, SplitDriver):
            return Resubmit(ids)
        raw = b"".join(self.taken.values())
        slots = u16(*[len(row) // 16 for row in self.taken.values()])
        return Resubmit(ids, slots, np.frombuffer(raw, d.desc.dtype))


@pytest.mark.parametrize("features", [0, PACKED, IN_ORDER, IN_ORDER | PACKED])
def test_buffers_in_flight_come_again_and_no_others(
    memory: GuestMemory, engine: Engine, features: int
) -> None:
    d = make_driver(memory, 16, features)
    record = Record()
    record.index = (  # type: ignore[method-assign]
        lambda: int(d.used[1]) if isinstance(d, SplitDriver) else None
    )
    q = make(memory, d, engine, inflight=record)
    ids = [d.add(*[d.buffer(8) for _ in range(1 + i % 2)]) for i in range(6)]
    d.publish()
    first = q.take(4)
    done = first.ids[:2] if features & IN_ORDER else first.ids[[2, 0]]
    q.give(done, zeros(2))
    if isinstance(d, SplitDriver):
        assert [e for e in record.events if e[0] != "take"] == [
            ("before", done.tolist(), 0),
            ("after", done.tolist(), 2, 2),
        ]
    left = [i for i in ids[:4] if i not in done.tolist()]
    assert list(record.taken) == left
    state = q.state()
    del q  # killed; the record and the ring's memory survive

    again = make(memory, d, engine, state=state, inflight=record, resubmit=record.resubmit(d))
    events = len(record.events)
    batch = again.take(1)
    rest = again.take()
    assert batch.ids.tolist() + rest.ids.tolist() == left
    assert record.events[events:] == []  # they are in the record already
    assert [
        e.addr for i in left for e in d.outstanding[i]
    ] == batch.addr.tolist() + rest.addr.tolist()
    assert again.outstanding == 2
    new = again.take()
    assert new.ids.tolist() == ids[4:]
    again.give(u16(*left, *ids[4:]), zeros(4))
    assert again.should_notify() is True
    assert sorted(i for i, _ in d.collect()) == sorted(ids)
    assert record.taken == {}


@pytest.mark.parametrize("features", [0, PACKED])
def test_the_driver_sees_nothing_until_everything_is_written(
    memory: GuestMemory, engine: Engine, features: int
) -> None:
    """All elements first; then one index, or the first descriptor's flags, makes them visible."""
    d = make_driver(memory, 8, features)
    record = Record()
    seen: list[Any] = []
    record.before_give = lambda ids: seen.append(d.collect())  # type: ignore[method-assign]
    q = make(memory, d, engine, inflight=record)
    for _ in range(6):  # across the end of the ring, with both wrap counters
        ids = [d.add(*[d.buffer(8)] * count) for count in (2, 1, 2)]
        d.publish()
        q.give(q.take().ids, zeros(3))
        assert [i for i, _ in d.collect()] == ids
    assert seen == [[]] * 6


@pytest.mark.parametrize("features", [0, EVENT, PACKED])
def test_after_a_crash_the_first_notification_is_sent_anyway(
    memory: GuestMemory, engine: Engine, features: int
) -> None:
    d = make_driver(memory, 8, features)
    d.interrupts(False)
    q = make(memory, d, engine, resubmit=Record().resubmit(d))
    assert q.should_notify() is True
    assert q.should_notify() is False


def test_a_record_that_is_nonsense_stops_the_queue(memory: GuestMemory, engine: Engine) -> None:
    d = make_driver(memory, 8)
    for ids, rule in ((u16(3, 3), "buffer-reused"), (u16(8), "head-range")):
        q = make(memory, d, engine, resubmit=Resubmit(ids))
        with pytest.raises(QueueError) as caught:
            assert len(q.take()) < len(q.take())  # the second of the two at the latest
        assert caught.value.rule == rule
    p = make_driver(memory, 8, PACKED)
    rows = np.zeros(1, p.desc.dtype)
    for bad in (Resubmit(u16(1)), Resubmit(u16(1), u16(2), rows), Resubmit(u16(1), u16(0), rows)):
        with pytest.raises(QueueError):
            make(memory, p, engine, resubmit=bad)


# what is written, what is read


@pytest.mark.parametrize("features", [0, EVENT, PACKED, PACKED | EVENT])
def test_ring_writes_are_logged_where_the_front_end_said(
    memory: GuestMemory, engine: Engine, features: int
) -> None:
    d = make_driver(memory, 8, features)
    for count in (5, 6, 3):  # across the end of the ring
        memory.dirty_log = log = BitmapLog(np.zeros(128, np.uint8))
        q = make(memory, d, engine, dirty_ring=0x200000, state=getattr(d, "state", None))
        ids = fill(d, count)
        q.give(q.take().ids, zeros(count))
        marked = np.flatnonzero(log.bitmap).tolist()
        if features & PACKED:
            assert d.addresses.desc >> 15 in marked
        else:
            assert marked == [0x200000 >> 15]
        assert [i for i, _ in d.collect()] == ids
        d.state = q.state()  # type: ignore[attr-defined]
    memory.dirty_log = log = BitmapLog(np.zeros(128, np.uint8))
    q = make(memory, d, engine, state=q.state())
    fill(d, 2)
    q.give(q.take().ids, zeros(2))
    assert not log.bitmap.any()


@pytest.mark.parametrize("features", [0, PACKED])
def test_a_refused_message_stops_the_queue_and_nothing_is_lost(features: int) -> None:
    backing = make_memory()
    d = make_driver(backing, 8, features | f.mask(f.VIRTIO_F_INDIRECT_DESC))
    memory, peer = by_messages(backing)
    q = make(memory, d, "batch")
    good = d.add(Element(0x100000, 8))
    bad = d.add(Element(0x100000, 8), Element(0x100000, 8), indirect=True)
    d.publish()
    row = int(d.desc["addr"][bad if isinstance(d, SplitDriver) else 1])
    peer.refuse = {row}
    assert q.take(1).ids.tolist() == [good]
    with pytest.raises(QueueError, match="dma-refused"):
        q.take()
    assert q.outstanding == 1
    peer.refuse = set()
    assert q.take().ids.tolist() == [bad]
    backing.close()


@pytest.mark.parametrize("features", [0, PACKED])
def test_what_was_taken_does_not_change_with_the_guest(
    memory: GuestMemory, engine: Engine, features: int
) -> None:
    """The batch is a copy: a guest that rewrites its descriptors afterwards changes nothing."""
    d = make_driver(memory, 32, features | f.mask(f.VIRTIO_F_INDIRECT_DESC))
    q = make(memory, d, engine)
    for _ in range(12):
        d.add(Element(0x100000, 8))
    d.add(Element(0x100000, 8), Element(0x200000, 8, True), indirect=True)
    d.publish()
    batch = q.take()
    before = [c.copy() for c in (batch.ids, batch.addr, batch.len, batch.writable)]
    memory.window(0x10000, 0x80000)[:] = 0xFF
    after: list[Any] = [batch.ids, batch.addr, batch.len, batch.writable]
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old, new)


# the common path stays on the batch engine


@pytest.mark.parametrize("features", [0, PACKED])
@pytest.mark.parametrize(
    "kinds",
    [
        [((False,), False)],
        [((True,), False)],
        [((True,), False), ((False,), False)],
        [((False, True), False)],
        [((True, True), False), ((False,), False)],
        [((False, True), True)],
        [((False, True, True), True), ((True,), False), ((False, False), True)],
    ],
)
def test_no_descriptor_of_a_common_shape_goes_through_python(
    memory: GuestMemory,
    features: int,
    kinds: list[tuple[tuple[bool, ...], bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    d = make_driver(memory, 128, features | f.mask(f.VIRTIO_F_INDIRECT_DESC))
    q = make(memory, d, "batch")

    def walk(*_: object) -> None:
        raise AssertionError("walked one by one")

    monkeypatch.setattr(type(q), "_walk" if isinstance(d, SplitDriver) else "_chain_of", walk)
    for _ in range(3):
        ids = [
            d.add(*[d.buffer(8, w) for w in writable], indirect=indirect)
            for _ in range(40 // len(kinds))
            for writable, indirect in kinds
        ]
        d.publish()
        batch = q.take()
        assert batch.ids.tolist() == ids
        q.give(batch.ids, zeros(len(ids)))
        d.collect()
