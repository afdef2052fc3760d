# SPDX-License-Identifier: Apache-2.0
"""Regressions of speed: ratios of work measured in turns, never times.

The limits are several times the measured ratios (``docs/benchmarks.md``), because the machine may
be busy.  The minimum of several turns is compared, because disturbances only add time.  A change
from whole batches to single buffers, or from one pass to several, exceeds every limit.
"""

from __future__ import annotations

import numpy as np
import pytest
from tests.bench.measure import Samples, Turn, clock, interleaved
from tests.bench.subjects import Case, OurSubject, Payloads, without_kernel
from tests.fakes.memory import Arena, make_memory

from vballoon.memory import GuestMemory, MemoryRegion, PageRanges
from vballoon.native import native
from vballoon.skipmap import Provenance, SkipMap

GIB, TIB = 1 << 30, 1 << 40
SPACE = 256 << 20


def least(samples: Samples) -> float:
    return min(samples.values)


def subjects(*cases: tuple[str, Case], guest: int = 4 * GIB) -> dict[str, OurSubject]:
    """Return a full ring for each (engine, case), all in one guest."""
    memory = make_memory((0, guest))
    arena = Arena(0x1000, SPACE - 0x1000)
    return {
        f"{engine} {case.size}": OurSubject(
            case, memory, arena, Payloads(case, memory, SPACE), engine=engine
        )
        for engine, case in cases
    }


def compare(made: dict[str, OurSubject], turns: int) -> dict[str, float]:
    """Return the minimum seconds for each buffer."""
    with without_kernel():
        found = interleaved({name: s.turn for name, s in made.items()}, turns, warm=2)
    return {name: least(found[name]) / made[name].buffers for name in made}


@pytest.mark.parametrize("packed", [False, True])
def test_batches_beat_single_buffers(packed: bool) -> None:
    """Measured: 30 times (NumPy) and more than 100 times (compiled)."""
    case = Case("hint", 1024, packed)
    cost = compare(subjects(("batch", case), ("numpy", case), ("scalar", case)), 7)
    assert cost["scalar 1024"] / cost["numpy 1024"] >= 12
    assert cost["scalar 1024"] / cost["batch 1024"] >= (40 if native else 12)


@pytest.mark.parametrize("role", ["hint", "report", "inflate", "walk"])
def test_the_compiled_loops_pay(role: str) -> None:
    """Measured: 3 to 40 times.  Without the extension both engines are the same."""
    case = Case(role, 256)
    cost = compare(subjects(("batch", case), ("numpy", case)), 7)
    assert cost["batch 256"] <= cost["numpy 256"] * (0.8 if native else 2)


@pytest.mark.parametrize("packed", [False, True])
def test_a_buffer_costs_the_same_in_a_large_ring(packed: bool) -> None:
    cases = [("batch", Case("hint", size, packed)) for size in (1024, 4096, 32768)]
    cost = compare(subjects(*cases, guest=128 * GIB), 7)
    assert cost["batch 32768"] <= 2.5 * cost["batch 1024"]
    assert cost["batch 4096"] <= 2 * cost["batch 1024"]


def test_a_chain_costs_no_more_than_its_elements() -> None:
    """A report of 32 blocks in an indirect table costs at most 3 times as much as 32 hints."""
    with_tables = Case("report", 256, indirect=True)
    cost = compare(subjects(("batch", with_tables), ("batch", Case("hint", 8192))), 7)
    assert cost["batch 256"] / 32 <= 3 * cost["batch 8192"]


def test_one_kick_and_one_interrupt_a_batch() -> None:
    for packed in (False, True):
        made = subjects(("batch", Case("hint", 1024, packed)))["batch 1024"]
        kicks, interrupts = made.queue.kicked, made.notified
        for _ in range(5):
            made.turn()
        assert (made.queue.kicked - kicks, made.notified - interrupts) == (5, 5)


def huge(size: int) -> GuestMemory:
    return GuestMemory([MemoryRegion(guest_phys_addr=0, size=size)])


def timed(work: object) -> Turn:
    def turn() -> float:
        start = clock()
        work()  # type: ignore[operator]
        return clock() - start

    return turn


def test_whole_bitmaps_are_processed_at_the_speed_of_memory() -> None:
    """Compare counting and uniting with a copy of the same bitmap (32 MiB) to touched memory."""
    skipmap = SkipMap(huge(TIB))
    both = (Provenance.REPORTED, Provenance.WALKED)
    blocks = np.arange(0, TIB >> 22, 2, dtype=np.uint64) << np.uint64(10)
    for provenance in both:
        skipmap.set_ranges(provenance, PageRanges(blocks, blocks + np.uint64(1024)))
    words, earlier = skipmap.bitmap(Provenance.WALKED).words, skipmap.combined(*both)
    copy = np.empty_like(words)
    found = interleaved(
        {
            "copy": timed(lambda: np.copyto(copy, words)),
            "count": timed(lambda: skipmap.count(Provenance.WALKED)),
            "combine": timed(lambda: skipmap.combined(*both, into=earlier)),
        },
        7,
    )
    skipmap.close()
    limits = {"count": 2.5, "combine": 6} if native else {"count": 8, "combine": 16}
    for name, limit in limits.items():
        assert least(found[name]) <= limit * least(found["copy"]), name


def test_a_huge_guest_costs_nothing_until_bits_are_set() -> None:
    def build(size: int) -> Turn:
        memory = huge(size)
        return timed(lambda: SkipMap(memory).close())

    found = interleaved({"small": build(16 * GIB), "huge": build(16 * TIB)}, 7)
    assert least(found["huge"]) <= 30 * least(found["small"])
