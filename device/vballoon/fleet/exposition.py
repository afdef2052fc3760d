# SPDX-License-Identifier: Apache-2.0
"""Samples as metrics of Prometheus and OpenMetrics, through ``prometheus_client``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from vballoon.fleet.sample import Sample

__all__ = ("Fleet", "families")

Family = CounterMetricFamily | GaugeMetricFamily

GAUGES: dict[str, tuple[str, Callable[[Sample], float | None]]] = {
    "guest_memory_bytes": ("Guest memory, the balloon included.", lambda s: s.guest_size),
    "actual_bytes": ("Guest memory without the balloon.", lambda s: s.actual),
    "target_bytes": ("What the operator asked the guest to have.", lambda s: s.target),
    "resident_bytes": ("Guest memory that the host holds.", lambda s: s.resident),
    "guest_available_bytes": (
        "What the guest can use without swapping, as its driver last said.",
        lambda s: s.available,
    ),
    "guest_free_bytes": ("Free guest memory, as its driver last said.", lambda s: s.free),
    "ballooned_bytes": (
        "Memory in the balloon that a snapshot leaves out now.",
        lambda s: s.ballooned,
    ),
    "reported_bytes": (
        "Reported free memory that a snapshot leaves out now.",
        lambda s: s.reported,
    ),
    "frontend_connected": ("Whether a front-end is connected.", lambda s: s.connected),
    "driver_running": ("Whether the guest's driver runs.", lambda s: s.driver_running),
}


class Fleet(Collector):
    """A collector that asks when it is asked: *ask* returns a sample of each machine."""

    def __init__(self, ask: Callable[[], Sequence[Sample]]) -> None:
        self._ask = ask

    def collect(self) -> Iterator[Family]:
        """See :class:`prometheus_client.registry.Collector`."""
        yield from families(self._ask())

    def describe(self) -> Iterable[Family]:
        """Return nothing, so that registering asks nobody."""
        return ()


def families(samples: Sequence[Sample]) -> Iterator[Family]:
    """Return the metric families of *samples*; a number that is not known has no line."""
    up = GaugeMetricFamily("vballoon_up", "Whether the server answered.", labels=["vm"])
    for sample in samples:
        up.add_metric([sample.name], sample.error is None)
    yield up
    known = [sample for sample in samples if sample.error is None]
    for name, (text, value) in GAUGES.items():
        gauge = GaugeMetricFamily(f"vballoon_{name}", text, labels=["vm"])
        for sample in known:
            number = value(sample)
            if number is not None:
                gauge.add_metric([sample.name], number)
        yield gauge
    broken = GaugeMetricFamily(
        "vballoon_broken_queues", "Queues stopped for breaking a rule.", labels=["vm", "rule"]
    )
    restarts = CounterMetricFamily(
        "vballoon_worker_restarts", "Times the worker was started again.", labels=["vm"]
    )
    for sample in known:
        rules = [rule for _, rule in sample.broken]
        for rule in sorted(set(rules)):
            broken.add_metric([sample.name, rule], rules.count(rule))
        restarts.add_metric([sample.name], sample.restarts)
    yield broken
    yield restarts
    yield from _counters(known)


def _counters(known: Sequence[Sample]) -> Iterator[Family]:
    names = sorted({name for sample in known for name in sample.counters})
    for name in names:
        family = CounterMetricFamily(
            f"vballoon_{name.replace('-', '_')}",
            f"The counter {name} of query-status.",
            labels=["vm"],
        )
        for sample in known:
            if name in sample.counters:
                family.add_metric([sample.name], sample.counters[name])
        yield family
