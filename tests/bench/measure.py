# SPDX-License-Identifier: Apache-2.0
"""Taking turns: A B C A B C …, so that what the machine does meanwhile hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ("Samples", "clock", "interleaved", "quiet", "ratio", "share_below")

Turn = Callable[[], float]
"""Does its piece of work once and returns the seconds that count."""

clock = time.perf_counter


@dataclass
class Samples:
    """What one contender needed in each turn, in turn order."""

    name: str
    unit: str
    values: list[float] = field(default_factory=list)
    params: dict[str, object] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    def per(self, count: float, unit: str) -> Samples:
        """Return the samples in another unit: each value divided by *count*."""
        return Samples(self.name, unit, [v / count for v in self.values], dict(self.params))


@contextmanager
def quiet() -> Iterator[None]:
    """Disable the garbage collector inside the block, like the standard library's timeit."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def interleaved(contenders: Mapping[str, Turn], turns: int, *, warm: int = 1) -> dict[str, Samples]:
    """Run *turns* rounds with one turn of every contender, after *warm* rounds that are dropped.

    The order is reversed in every second round, so that nobody always follows the same neighbour.
    """
    found = {name: Samples(name, "s") for name in contenders}
    names = list(contenders)
    with quiet():
        for number in range(-warm, turns):
            for name in names if number % 2 else reversed(names):
                seconds = contenders[name]()
                if number >= 0:
                    found[name].values.append(seconds)
    return found


def ratio(above: Samples, below: Samples) -> float:
    """Return the median of ``above / below`` over the rounds, in pairs from the same round."""
    return statistics.median(pairs(above, below))


def pairs(above: Samples, below: Samples) -> list[float]:
    """``above / below`` of each round."""
    return [a / b for a, b in zip(above.values, below.values, strict=True)]


def share_below(values: Sequence[float], limit: float) -> float:
    """Which part of *values* is below *limit*."""
    return sum(v < limit for v in values) / len(values)


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(percent / 100 * len(ordered)) - 1))]
