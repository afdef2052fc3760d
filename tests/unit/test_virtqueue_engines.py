# SPDX-License-Identifier: Apache-2.0
"""Random programs of driver actions, good and bad: both engines do the same, bit by bit.

A program runs twice, in two identical guests, once for each engine.  Everything that can be seen
is compared: batches, errors and their rules, notifications, positions, and the rings' memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.driver import DriverRing, Element, SplitDriver, make_driver
from tests.fakes.memory import Arena, make_memory

from vballoon.errors import QueueError
from vballoon.native import native
from vballoon.virtqueue import RULES, Engine, RingState, Virtqueue, make_virtqueue
from virtio_formats.virtio import features as f

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
def chains(draw: st.DrawFn) -> tuple[Element, ...]:
    """Elements of a buffer: readable ones first, and now and then a bad one among them."""
    kinds = st.lists(GOOD_ELEMENT, min_size=1, max_size=5)
    found = draw(kinds)
    split = draw(st.integers(0, len(found)))
    elements = [e._replace(writable=i >= split) for i, e in enumerate(found)]
    if draw(st.integers(0, 40)) == 17:  # not 0, which is drawn far more often
        elements[draw(st.integers(0, len(elements) - 1))] = draw(BAD_ELEMENT)
    return tuple(elements)


PUBLISH, COLLECT = ("publish",), ("collect",)
WHAT = ["flags", "next", "len", "head", "idx", "id", "table", "event", "addr"]
SCRIBBLE = st.tuples(
    # what, where, and with which value
    st.just("scribble"),
    st.sampled_from(WHAT),
    st.integers(0, 63),
    st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF), st.sampled_from([0x80, 0x8000, 0x8080])),
)


def programs() -> st.SearchStrategy[list[tuple[Any, ...]]]:
    """Mostly whole rounds (fill, spoil something, publish, take, give), and odd steps between."""
    offer = st.tuples(st.just("many"), chains(), st.booleans(), st.integers(1, 20))
    spoil: Any = st.one_of(st.just([]), st.just([]), st.lists(SCRIBBLE, max_size=2))
    take = st.tuples(st.just("take"), st.one_of(st.none(), st.integers(0, 9)))
    back = st.tuples(st.just("give"), st.integers(1, 64), st.integers(0, 1 << 32))
    whole = st.builds(
        lambda offers, spoils, takes, backs: [*offers, *spoils, PUBLISH, *takes, *backs, COLLECT],
        st.lists(offer, min_size=1, max_size=4),
        spoil,
        st.lists(take, min_size=1, max_size=2),
        st.lists(back, max_size=2),
    )
    odd = st.one_of(
        offer,
        take,
        back,
        st.just(PUBLISH),
        st.just(COLLECT),
        st.tuples(st.just("kicks"), st.booleans()),
        st.tuples(st.just("interrupts"), st.booleans()),
    )
    steps = st.one_of(whole, whole, odd.map(lambda step: [step]))
    return st.lists(steps, min_size=1, max_size=8).map(
        lambda many: [s for some in many for s in some]
    )


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

    def do_many(self, elements: tuple[Element, ...], indirect: bool, count: int) -> None:
        d = self.driver
        # A sound driver keeps to what was negotiated; one that is not tries tables anyway.
        indirect = indirect and (bool(d.features >> 28 & 1) or not self.sound)
        for _ in range(count):
            if len(elements) <= d.size and d.room >= (1 if indirect else len(elements)):
                d.add(*elements, indirect=indirect)

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
        elif what in (d.desc.dtype.names or ()):
            d.desc[what][at] = value
        self.sound = False


KINDS = {"scalar": "scalar", "numpy": "batch", "batch": "compiled" if native else "batch"}
ENGINES: tuple[Engine, ...] = ("scalar", "numpy", "batch")


def make_run(engine: Engine, size: int, features: int, start: int) -> Run:
    memory = make_memory(*REGIONS)
    driver = make_driver(memory, size, features, arena=Arena(0x1000, 0x8000), start=start)
    driver.arena = Arena(TABLES, 1 << 16)
    state = RingState(start, start) if isinstance(driver, SplitDriver) else RingState()
    queue = make_virtqueue(memory, size, driver.addresses, driver.features, state, engine=engine)
    assert type(queue).__name__.lower().startswith(KINDS[engine])
    return Run(driver, queue)


def both(
    size: int, features: int, start: int, program: list[tuple[Any, ...]]
) -> tuple[list[Any], list[Any]]:
    """Return the results of *program* with the scalar engine and with the batch engine."""
    seen = []
    for engine in ENGINES:
        run = make_run(engine, size, features, start)
        try:
            for step in program:
                run.step(*step)
            run.trace.append(run.driver.memory.read(0x1000, 0x8000))
        finally:
            run.driver.memory.close()
        seen.append(run.trace)
    assert seen[1] == seen[2], "the compiled engine and the one in NumPy differ"
    return seen[0], seen[1]


STARTS = st.sampled_from([0, 1, 65530, 65535])


@settings(max_examples=300, deadline=None)
@given(SIZES, FEATURES, STARTS, programs())
def test_split_engines_agree_on_anything(
    size: int, features: int, start: int, program: list[tuple[Any, ...]]
) -> None:
    scalar, batch = both(size, features, start, program)
    assert scalar == batch
    assert {seen for seen in scalar if isinstance(seen, str)} <= RULES.keys()


@settings(max_examples=300, deadline=None)
@given(PACKED_SIZES, FEATURES, programs())
def test_packed_engines_agree_on_anything(
    size: int, features: int, program: list[tuple[Any, ...]]
) -> None:
    scalar, batch = both(size, features | f.mask(f.VIRTIO_F_RING_PACKED), 0, program)
    assert scalar == batch
    assert {seen for seen in scalar if isinstance(seen, str)} <= RULES.keys()


# hypothesis likes small programs; these are long ones, on larger rings, most of them sound


def random_elements(rng: Random) -> tuple[Element, ...]:
    count = rng.choice([1, 1, 1, 2, 3, 6])
    split = rng.choice([0, count, rng.randint(0, count)])
    spans = [(0, (1 << 20) + 60000), (HIGH, 60000)]
    elements = []
    for i in range(count):
        base, size = rng.choice(spans)
        elements.append(
            Element(base + rng.randrange(size), rng.choice([0, 4, 256, 4096]), i >= split)
        )
    if rng.random() < 0.0005:
        elements[-1] = elements[-1]._replace(addr=rng.choice([1 << 40, (1 << 64) - 1]))
    return tuple(elements)


def random_spoil(rng: Random) -> tuple[Any, ...]:
    value = rng.choice([rng.randrange(8), rng.randrange(65536), 0x80, 0x8000, 0x8080])
    return ("scribble", rng.choice(WHAT), rng.randrange(64), value)


def random_program(rng: Random) -> list[tuple[Any, ...]]:
    program: list[tuple[Any, ...]] = []
    alike = rng.random() < 0.3  # a batch of buffers of one kind, as devices mostly see
    for _ in range(rng.randint(3, 12)):
        for _ in range(1 if alike else rng.randint(1, 12)):
            many = rng.choice([1, 3, 30]) if not alike else 64
            program.append(("many", random_elements(rng), rng.random() < 0.3, many))
        program += [random_spoil(rng) for _ in range(rng.randint(1, 2) * (rng.random() < 0.2))]
        program.append(PUBLISH)
        program += [("take", rng.choice([None, None, 1, 7, 40])) for _ in range(rng.randint(1, 2))]
        program += [
            ("give", rng.choice([1, 5, 64, 64]), rng.randrange(1000))
            for _ in range(rng.randint(0, 3))
        ]
        program += [COLLECT, ("kicks", rng.random() < 0.7), ("interrupts", rng.random() < 0.7)]
    return program


@pytest.mark.parametrize("format_", [0, f.mask(f.VIRTIO_F_RING_PACKED)])
def test_engines_agree_on_long_programs(format_: int) -> None:
    rng, chains_taken, rules = Random(20240917 + format_), 0, set()
    for _ in range(150):
        sizes = [16, 37, 64, 100, 128] if format_ else [16, 32, 64, 128]
        size, start = rng.choice(sizes), rng.choice([0, 65500])
        features = format_ | sum(
            f.mask(bit) * (rng.random() < 0.6)
            for bit in (f.VIRTIO_F_INDIRECT_DESC, f.VIRTIO_F_EVENT_IDX, f.VIRTIO_F_IN_ORDER)
        )
        program = random_program(rng)
        scalar, batch = both(size, features, start, program)
        assert scalar == batch, (size, features, start, program)
        rules |= {seen for seen in scalar if isinstance(seen, str)}
        chains_taken += sum(len(s[2]) for s in scalar if isinstance(s, tuple) and s[0] == "ids")
    assert chains_taken > 10_000, "the programs are too small to mean anything"
    assert len(rules) >= 4, rules
