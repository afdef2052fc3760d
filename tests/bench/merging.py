# SPDX-License-Identifier: Apache-2.0
"""The blocks of a report: merged once, beside merging them a second time before freeing."""

from __future__ import annotations

import numpy as np
from tests.bench.measure import Turn, clock, interleaved, ratio
from tests.bench.options import Options
from tests.bench.record import Part

from vballoon.memory import ByteRanges
from vballoon.memory.ranges import blocks

__all__ = ("add_table",)

COUNTS = (32, 1024, 32768)
"""Blocks in a batch: one report of Linux, and full queues."""
BLOCK = 4 << 20


def add_table(part: Part, options: Options) -> None:
    """Add the table."""
    table = part.table(
        "A batch of reported blocks of 4 MiB becomes byte ranges, microseconds",
        "blocks",
        "merged once (ours)",
        "merged twice (as before PageRanges)",
        "twice / once",
    )
    for count in COUNTS:
        found = interleaved(_contenders(count), options.turns)
        table.rows.append(
            [
                count,
                found["once"].median * 1e6,
                found["twice"].median * 1e6,
                ratio(found["twice"], found["once"]),
            ]
        )


def _contenders(count: int) -> dict[str, Turn]:
    """Return both ways for the same *count* blocks; a turn gives the seconds of one batch."""
    numbers = np.random.default_rng(3).permutation(count).astype(np.uint64)
    address = numbers * np.uint64(2 * BLOCK)  # no two of them touch
    length, writable = np.full(count, BLOCK, np.uint32), np.ones(count, np.bool_)
    loops = max(1, 32768 // count)

    def once() -> float:
        begin = clock()
        for _ in range(loops):
            blocks(address, length, writable)[0].bytes()
        return (clock() - begin) / loops

    def twice() -> float:
        begin = clock()
        for _ in range(loops):
            ranges = blocks(address, length, writable)[0].bytes()
            ByteRanges(ranges.start, ranges.end)
        return (clock() - begin) / loops

    return {"once": once, "twice": twice}
