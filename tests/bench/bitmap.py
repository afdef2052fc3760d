# SPDX-License-Identifier: Apache-2.0
"""The skip bitmap: ranges a second into it, and whole bitmaps of huge guests."""

from __future__ import annotations

import json
import subprocess
import sys
from unittest import mock

import numpy as np
from tests.bench.measure import Samples, Turn, clock, interleaved, ratio
from tests.bench.merging import add_table
from tests.bench.options import Options
from tests.bench.peer import Copy, Job, Work
from tests.bench.record import ROOT, Part
from tests.bench.subjects import COMPILED
from tests.fakes.memory import make_memory

from vballoon.memory import GuestMemory, MemoryRegion, PageRanges
from vballoon.skipmap import Provenance, SkipMap
from vballoon.virtqueue import RingAddresses
from vballoon_spec.walk.formats import WalkRange

__all__ = ("run",)

GIB, TIB = 1 << 30, 1 << 40
GUEST = 64 * GIB
ORDERS = (0, 3, 5, 6, 8, 9, 10)
BATCHES = (1024, 4096, 65536)
SHARES = {0: 20, 1: 16, 2: 13, 3: 11, 4: 9, 5: 7, 6: 6, 7: 5, 8: 4, 9: 4, 10: 5}
"""Free blocks of each order, in hundredths, as a guest that has run for a while has them."""


def run(options: Options) -> Part:
    """Everything about the bitmap."""
    part = Part("bitmap", "Bitmap")
    part.notes += [
        (
            "Ranges are records `{le64 pfn, le64 num}` as the walk queue brings them: checked "
            "against "
            "guest memory, then set; batches in shuffled order unless said otherwise. *C* is a "
            "plain "
            "loop over the same records with the same checks (`tests/bench/peer.c`)."
        ),
        f"The guest of the first table has {GUEST // GIB} GiB (2 MiB of bitmap).",
    ]
    _ranges(part, options)
    add_table(part, options)
    _whole(part, options, TIB, "1 TiB")
    if not options.quick:
        _whole(part, options, 16 * TIB, "16 TiB")
    _building(part)
    return part


def _ranges(part: Part, options: Options) -> None:
    memory = make_memory((0, GUEST))
    table = part.table(
        "Million ranges a second into the bitmap",
        "ranges",
        "batch",
        "ours",
        "NumPy alone",
        "C",
        "C / ours",
        "memcpy of the records, GB/s",
    )
    kinds: list[tuple[str, int | str]] = [(f"order {order}", order) for order in ORDERS]
    kinds += [("orders 0 to 10 mixed", "mixed"), ("mixed, by address", "sorted")]
    kinds += [("unaligned, 1 to 2000 pages", "ragged")]
    for title, kind in kinds:
        for batch in BATCHES:
            records = _records(kind, batch, memory.end >> 12)
            found = _compare_ranges(memory, records, options)
            ours = _rate(part, found["ours"], records.size, kind=str(kind), batch=records.size)
            plain = _rate(part, found["C"], records.size, kind=str(kind), batch=records.size)
            pure = _rate(part, found["numpy"], records.size, kind=str(kind), batch=records.size)
            copied = found["copy"].median
            table.rows.append(
                [title, records.size, ours.median, pure.median, plain.median,
                 ratio(found["ours"], found["C"]), records.nbytes / copied * 1e-9]
            )  # fmt: skip
            if kind in (9, 10, "mixed") and batch in (1024, 65536):
                part.goal(
                    f"buddy-aligned ranges into the bitmap, {title}, batches of {batch}",
                    ours.median,
                    40,
                    at_most=False,
                    unit="M/s",
                )
    memory.close()


def _records(kind: int | str, count: int, pages: int) -> np.ndarray:
    """*count* records (fewer where the guest has not so many such blocks)."""
    rng = np.random.default_rng(5)
    if isinstance(kind, int):
        pfn = rng.permutation(np.arange(0, pages, 1 << kind, dtype=np.uint64))[:count]
        num = np.full(pfn.size, 1 << kind, np.uint64)
    elif kind == "ragged":
        num = rng.integers(1, 2000, count).astype(np.uint64)
        pfn = rng.integers(0, pages - 2000, count).astype(np.uint64)
    else:
        pfn, num = _mixed(rng, count, pages)
    records = np.zeros(pfn.size, WalkRange.dtype())
    records["pfn"], records["num"] = pfn, num
    if kind == "sorted":
        records = np.sort(records, order="pfn")
    return records


def _mixed(rng: np.random.Generator, count: int, pages: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of all orders, each naturally aligned, none on top of another."""
    order = rng.choice(list(SHARES), count, p=np.array(list(SHARES.values())) / 100)
    order = np.sort(order)[::-1]  # largest first: what follows stays aligned
    num = np.uint64(1) << order.astype(np.uint64)
    pfn = np.cumsum(num) - num
    keep = pfn + num <= pages
    mix = rng.permutation(int(keep.sum()))
    return pfn[keep][mix], num[keep][mix]


def _compare_ranges(
    memory: GuestMemory, records: np.ndarray, options: Options
) -> dict[str, Samples]:
    skipmap = SkipMap(memory)
    job = Job(memory, 64, RingAddresses(0, 4096, 8192), 0, Work.WALK)
    loops = max(1, 65536 // records.size)
    patches = [mock.patch(name, None) for name in COMPILED]

    def ours() -> float:
        start = clock()
        for _ in range(loops):
            skipmap.set_records(Provenance.WALKED, records, 1)
        return (clock() - start) / loops

    def numpy() -> float:
        for patch in patches:
            patch.start()
        seconds = ours()
        for patch in patches:
            patch.stop()
        return seconds

    def plain() -> float:
        return sum(job.plain_ranges(records) for _ in range(loops)) / loops

    copy = Copy(records.nbytes)
    found = interleaved(
        {"ours": ours, "numpy": numpy, "C": plain, "copy": lambda: copy(loops) / loops},
        min(options.turns, 21),
    )
    words = skipmap.bitmap(Provenance.WALKED).words[: memory.end >> 18]
    assert (words == job.bitmap[: words.size]).all(), "the C loop has set other bits"
    skipmap.close()
    return found


def _rate(part: Part, samples: Samples, count: int, **params: object) -> Samples:
    rate = Samples(samples.name, "M ranges/s", [count / v * 1e-6 for v in samples.values])
    return part.keep(rate, table="ranges", **params)


def _huge(size: int) -> GuestMemory:
    """Return a guest memory that is used for sizes only and never accessed."""
    low = MemoryRegion(guest_phys_addr=0, size=3 * GIB)
    return GuestMemory([low, MemoryRegion(guest_phys_addr=4 * GIB, size=size - 3 * GIB)])


def _whole(part: Part, options: Options, size: int, title: str) -> None:
    """Combine, count and list a bitmap of which about half the bits are set."""
    skipmap = SkipMap(_huge(size))
    blocks = np.arange(4 * GIB >> 22, size >> 22, dtype=np.uint64)
    rng = np.random.default_rng(3)
    for provenance in (Provenance.REPORTED, Provenance.WALKED):
        chosen = blocks[rng.random(blocks.size) < 0.5] << np.uint64(10)
        skipmap.set_ranges(provenance, PageRanges(chosen, chosen + np.uint64(1024)))
        skipmap.bitmap(provenance).words[:] |= np.uint64(0)  # all of it has memory now
    one = skipmap.bitmap(Provenance.WALKED)
    nbytes = one.words.nbytes
    copy = Copy(nbytes)
    both = (Provenance.REPORTED, Provenance.WALKED)
    earlier = skipmap.combined(*both)
    ours: dict[str, Turn] = {
        "copy to new memory": _timed(one.words.copy),
        "combine": _timed(lambda: skipmap.combined(*both, into=earlier)),
        "combine to new memory": _timed(lambda: skipmap.combined(*both)),
        "count": _timed(one.count),
        "extents": _timed(one.extents),
    }
    found = interleaved(
        ours | {"copy": lambda: copy(1)}, 5 if size > TIB else min(options.turns, 15)
    )
    moved = {"combine": 3 * nbytes, "combine to new memory": 3 * nbytes}
    moved |= {"count": nbytes, "extents": nbytes}
    table = part.table(
        f"A guest of {title}: {nbytes >> 20} MiB of bitmap",
        "what",
        "ms",
        "GB/s moved",
        "share of the copy's",
        note="Moved: bytes read and written, for the copies too. Copy and combine write to memory "
        "that was used before (two bitmaps are combined into an earlier result, as "
        "`combined(into=...)` does); new memory, which the kernel has to find and to clear "
        "first, has rows of its own.",
    )
    for name, samples in found.items():
        part.keep(samples, table="whole", guest=title)
        speed = moved.get(name, 2 * nbytes) / samples.median
        share = moved.get(name, 2 * nbytes) / (2 * nbytes) * ratio(found["copy"], samples)
        table.rows.append([name, samples.median * 1e3, speed * 1e-9, share])
        if name in ("combine", "count"):
            part.goal(
                f"{name} of a {title} guest, share of the copy bandwidth", share, 0.5, at_most=False
            )
    skipmap.close()


def _timed(work: object) -> Turn:
    def turn() -> float:
        start = clock()
        work()  # type: ignore[operator]
        return clock() - start

    return turn


_CHILD = """
import json, re, time
import numpy as np
from tests.bench.bitmap import TIB, _huge
from vballoon.memory import PageRanges
from vballoon.skipmap import Provenance, SkipMap
def rss():
    text = open('/proc/self/status').read()
    return int(re.search(r'VmRSS:\\s+(\\d+)', text)[1]) * 1024
memory = _huge(16 * TIB)
before, start = rss(), time.perf_counter()
skipmap = SkipMap(memory)
built, empty = time.perf_counter() - start, rss() - before
for p in (Provenance.REPORTED, Provenance.WALKED):
    for region in skipmap.layout.regions:
        first = region.first_pfn
        skipmap.set_ranges(p, PageRanges([first], [first + region.pages]))
print(json.dumps([built, empty, rss() - before, 2 * 16 * TIB // 4096 // 8]))
"""


def _building(part: Part) -> None:
    """All structures for a guest of 16 TiB, in a process of their own."""
    results = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True, cwd=ROOT
            ).stdout
        )
        for _ in range(3)
    ]
    seconds = part.keep(Samples("build 16 TiB", "s", [r[0] for r in results]))
    _, empty, full, bitmaps = results[-1]
    table = part.table("All structures for a guest of 16 TiB", "what", "")
    table.rows += [
        ["time to build, ms", seconds.median * 1e3],
        ["resident before the first bit, MiB", empty / (1 << 20)],
        ["two bitmaps with every bit set, MiB resident", full / (1 << 20)],
        ["the bits of two bitmaps, MiB", bitmaps / (1 << 20)],
    ]
    part.goal("building all structures for a 16 TiB guest", seconds.median, 1, unit="s")
    part.goal("resident memory / bits, two full bitmaps of 16 TiB", full / bitmaps, 1.01)
