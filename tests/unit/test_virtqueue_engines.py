# SPDX-License-Identifier: Apache-2.0
"""Random programs of driver actions, good and bad: both engines do the same, bit by bit.

A program runs twice, in two identical guests, once for each engine.  Everything that can be seen
is compared: batches, errors and their rules, notifications, positions, and the rings' memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.driver import DriverRing, Element, SplitDriver, make_driver
from tests.fakes.memory import Arena, make_memory

from vballoon.errors import QueueError
from vballoon.virtqueue import RULES, RingState, Virtqueue, make_virtqueue
from vballoon_spec.virtio import features as f

HIGH = 1 << 32
REGIONS = ((0, 1 << 20), (1 << 20, 1 << 16), (HIGH, 1 << 16))  # two adjacent ones, a hole, a third
TABLES = (1 << 20) - 40  # the middle of a table here is in the second region

SIZES = st.sampled_from([1, 2, 4, 8, 16, 64])
PACKED_SIZES = st.sampled_from([1, 2, 3, 5, 8, 13, 16, 64])
FEATURES = st.sets(
    st.sampled_from([f.VIRTIO_F_INDIRECT_DESC, f.VIRTIO_F_EVENT_IDX, f.VIRTIO_F_IN_ORDER])
).map(lambda bits: f.mask(*bits))

GOOD_ELEMENT = st.builds(
    Element,
    st.one_of(
        st.integers(0, (1 << 20) + (1 << 15)),
        st.integers(HIGH, HIGH + (1 << 15)),
        st.just((1 << 20) - 8),  # crosses into the adjacent region
        st.just(HIGH + (1 << 16) - 16),  # ends where memory ends
    ),
    st.one_of(st.just(0), st.integers(1, 16), st.just(4096)).map(lambda n: n),
    st.just(False),
).map(lambda e: e if e.addr < HIGH + (1 << 15) else e._replace(len=min(e.len, 16)))
BAD_ELEMENT = st.builds(
    Element,
    st.sampled_from([1 << 30, HIGH - 8, HIGH + (1 << 16) - 8, (1 << 64) - 8, (1 << 63), 0]),
    st.sampled_from([1, 16, 4096, 0xFFFFFFFF]),
    st.booleans(),
)


@st.composite
def chains(draw: st.DrawFn, bad: bool) -> tuple[Element, ...]:
    """Elements of a buffer: readable ones first, unless it is a bad one."""
    kinds = st.lists(GOOD_ELEMENT, min_size=1, max_size=5)
    found = draw(kinds)
    split = draw(st.integers(0, len(found)))
    elements = [e._replace(writable=i >= split) for i, e in enumerate(found)]
    if bad and draw(st.integers(0, 3)) == 0:
        elements[draw(st.integers(0, len(elements) - 1))] = draw(BAD_ELEMENT)
    return tuple(elements)


SCRIBBLE = st.tuples(
    st.just("scribble"),
    st.sampled_from(["flags", "next", "len", "head", "idx", "id", "table", "event"]),
    st.integers(0, 63),
    st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF), st.sampled_from([0x80, 0x8000, 0x8080])),
)


def programs(bad: bool) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    actions: list[st.SearchStrategy[tuple[Any, ...]]] = [
        st.tuples(st.just("add"), chains(bad), st.booleans()),
        st.tuples(st.just("many"), chains(bad), st.booleans(), st.integers(2, 64)),
        st.just(("publish",)),
        st.tuples(st.just("take"), st.one_of(st.none(), st.integers(0, 9))),
        st.tuples(st.just("give"), st.integers(1, 64), st.integers(0, 1 << 32)),
        st.just(("collect",)),
        st.tuples(st.just("kicks"), st.booleans()),
        st.tuples(st.just("interrupts"), st.booleans()),
    ]
    return st.lists(st.one_of(*actions, *([SCRIBBLE] if bad else [])), max_size=40)


@dataclass
class Run:
    """One guest, one engine, and what was seen."""

    driver: DriverRing
    queue: Virtqueue
    trace: list[Any] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    sound: bool = True
    broken: bool = False

    def step(self, name: str, *args: Any) -> None:
        getattr(self, "do_" + name)(*args)
        self.trace.append((name, self.queue.state(), self.queue.outstanding))

    def do_add(self, elements: tuple[Element, ...], indirect: bool) -> None:
        indirect = indirect and (not self.sound or bool(self.driver.features >> 28 & 1))
        need = 1 if indirect else len(elements)
        if self.driver.room >= need and (not indirect or len(elements) <= self.driver.size):
            self.driver.add(*elements, indirect=indirect)

    def do_many(self, elements: tuple[Element, ...], indirect: bool, count: int) -> None:
        for _ in range(count):
            self.do_add(elements, indirect)

    def do_publish(self) -> None:
        self.driver.publish()

    def do_take(self, limit: int | None) -> None:
        if self.broken:
            return
        try:
            batch = self.queue.take(limit)
        except QueueError as error:
            self.broken = True
            self.trace.append(error.rule)
            return
        self.held += batch.ids.tolist()
        for name in ("ids", "first", "addr", "len", "writable"):
            column = getattr(batch, name)
            self.trace.append((name, column.dtype.str, column.tolist()))

    def do_give(self, count: int, seed: int) -> None:
        ids = self.held[:count]
        if not self.driver.in_order:
            np.random.default_rng(seed).shuffle(ids)
        self.held = [i for i in self.held if i not in ids]
        written = np.random.default_rng(seed).integers(0, 3, len(ids), np.uint32)
        self.queue.give(np.array(ids, np.uint16), written)
        self.trace.append(self.queue.should_notify())

    def do_collect(self) -> None:
        if self.sound:
            self.trace.append(self.driver.collect())

    def do_kicks(self, wanted: bool) -> None:
        self.trace.append(self.queue.enable_kicks() if wanted else self.queue.disable_kicks())

    def do_interrupts(self, wanted: bool) -> None:
        self.driver.interrupts(wanted)

    def do_scribble(self, what: str, where: int, value: int) -> None:
        d, at = self.driver, where % self.driver.size
        if what == "table":
            d.memory.write(TABLES + 2 * where, value.to_bytes(2, "little"))
        elif what == "event":
            d.memory.write(d.addresses.driver, value.to_bytes(2, "little"))
        elif what in ("head", "idx") and isinstance(d, SplitDriver):
            if what == "head":
                d.avail_ring[at] = value
            else:
                d.avail[1] = (int(d.avail[1]) + value) % 65536
        elif what in d.desc.dtype.names:
            d.desc[what][at] = value
        self.sound = False


def make_run(engine: Literal["scalar", "batch"], size: int, features: int, start: int) -> Run:
    memory = make_memory(*REGIONS)
    driver = make_driver(memory, size, features, arena=Arena(0x1000, 0x8000), start=start)
    driver.arena = Arena(TABLES, 1 << 16)
    state = RingState(start, start) if isinstance(driver, SplitDriver) else RingState()
    queue = make_virtqueue(memory, size, driver.addresses, driver.features, state, engine=engine)
    assert type(queue).__name__.lower().startswith(engine)
    return Run(driver, queue)


def both(
    size: int, features: int, start: int, program: list[tuple[Any, ...]]
) -> tuple[list[Any], list[Any]]:
    """What was seen of *program* with the scalar engine, and with the batch engine."""
    seen = []
    for engine in ("scalar", "batch"):
        run = make_run(engine, size, features, start)
        try:
            for step in program:
                run.step(*step)
            run.trace.append(run.driver.memory.read(0x1000, 0x8000))
        finally:
            run.driver.memory.close()
        seen.append(run.trace)
    return seen[0], seen[1]


STARTS = st.sampled_from([0, 1, 65530, 65535])


@settings(max_examples=300, deadline=None)
@given(SIZES, FEATURES, STARTS, programs(bad=True))
def test_split_engines_agree_on_anything(
    size: int, features: int, start: int, program: list[tuple[Any, ...]]
) -> None:
    scalar, batch = both(size, features, start, program)
    assert scalar == batch
    assert {seen for seen in scalar if isinstance(seen, str)} <= RULES.keys()


@settings(max_examples=300, deadline=None)
@given(PACKED_SIZES, FEATURES, programs(bad=True))
def test_packed_engines_agree_on_anything(
    size: int, features: int, program: list[tuple[Any, ...]]
) -> None:
    scalar, batch = both(size, features | f.mask(f.VIRTIO_F_RING_PACKED), 0, program)
    assert scalar == batch
    assert {seen for seen in scalar if isinstance(seen, str)} <= RULES.keys()
