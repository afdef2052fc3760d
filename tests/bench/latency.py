# SPDX-License-Identifier: Apache-2.0
"""From the driver's kick to the used buffer: idle, and while another queue is busy."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tests.bench.fronts import SPACE, Front, connect
from tests.bench.measure import Samples, clock, interleaved, percentile, quiet, ratio
from tests.bench.options import Options
from tests.bench.record import Part
from tests.lab.backend import TRANSPORTS, Backend

from virtio_formats.virtio.balloon import BalloonStat, StatTag

__all__ = ("run",)

MIB = 1 << 20
DEFLATE, STATS, REPORT = 1, 2, 4
TRIPS = {"quick": 300, "short": 1500, "full": 6000}
STORM = 32
"""Blocks in a report of the storm: as many as Linux sends."""


def run(options: Options) -> Part:
    """Round trips of a doorbell, and of the statistics."""
    part = Part("latency", "Latency")
    part.notes += [
        (
            "A trip: the driver makes one buffer of the deflate queue available, kicks, sleeps "
            "until "
            "the interrupt, finds the buffer used. *echo* is the floor for any such process: a "
            "small "
            "Python program that answers each eventfd with another."
        ),
        (
            f"Storm: meanwhile the reporting queue is kept busy by another process ({STORM} "
            f"reports of "
            "64 KiB a kick), so that the server is never idle and holes are punched without "
            "end. Both "
            "run on the same processors as the guest's side."
        ),
    ]
    table = part.table(
        "Kick to used buffer, microseconds", "transport", "", "p50", "p90", "p99", "p50 / echo's"
    )
    medians: dict[tuple[str, str], Samples] = {}
    for storm in (False, True):
        found = _trips(options, storm=storm)
        kind = "storm" if storm else "idle"
        for name, samples in found.items():
            medians[name, kind] = part.keep(samples, load=kind)
            table.rows.append(
                [name, kind]
                + [percentile(samples.values, p) for p in (50, 90, 99)]
                + [samples.median / found["echo"].median]
            )
    for kind in ("idle", "storm"):
        doorbell = medians["vfio-user", kind].median / medians["vhost-user", kind].median
        part.notes.append(f"Doorbell over vfio-user / over vhost-user, {kind}: {doorbell:.2f}.")
    _statistics(part, options)
    return part


def _trips(options: Options, *, storm: bool) -> dict[str, Samples]:
    """Measure the round trips of all contenders, in turns of a few dozen."""
    share = 30
    with (
        Backend("vhost-user") as one,
        Backend("vfio-user") as two,
        connect("vhost-user", one.socket) as vhost,
        connect("vfio-user", two.socket) as vfio,
    ):
        echo = _Echo()
        found = {name: Samples(name, "us") for name in (*TRANSPORTS, "echo")}
        trips: dict[str, Callable[[], None]] = {
            "vhost-user": _trip(vhost),
            "vfio-user": _trip(vfio),
            "echo": echo.trip,
        }
        fronts = {"vhost-user": vhost, "vfio-user": vfio}
        with quiet():
            for _ in range(TRIPS[options.form] // share):
                for name, trip in trips.items():
                    stop = _Storm(fronts[name]) if storm and name in fronts else None
                    trip()
                    for _ in range(share):
                        start = clock()
                        trip()
                        found[name].values.append((clock() - start) * 1e6)
                        time.sleep(0.0002)  # the server goes back to sleep: the usual case
                    if stop is not None:
                        stop.end()
        echo.close()
    return found


def _trip(front: Front) -> Callable[[], None]:
    ring = front.rings[DEFLATE]
    addr, length = front.place(np.arange(SPACE >> 12, (SPACE >> 12) + 256, dtype="<u4").tobytes())

    def trip() -> None:
        ring.fill(addr, length, writable=False)
        front.kick(DEFLATE)
        front.wait(DEFLATE)
        ring.drain()

    return trip


class _Storm:
    """A process that keeps the reporting queue busy."""

    def __init__(self, front: Front) -> None:
        self._stop = os.eventfd(0, os.EFD_NONBLOCK)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._run(front)
            finally:
                os._exit(0)
        time.sleep(0.02)

    def _run(self, front: Front) -> None:
        ring = front.rings[REPORT]
        addr = SPACE + 2 * MIB * np.arange(STORM, dtype=np.uint64)
        ring.resume()  # type: ignore[attr-defined]
        for _ in range(1 << 20):
            ring.fill(addr, np.full(STORM, 64 * 1024), writable=True)
            if ring.wants_kick():
                front.kick(REPORT)
            while not ring.done():
                front.wait(REPORT)
            if self._asked_to_stop():
                return

    def _asked_to_stop(self) -> bool:
        try:
            return bool(os.eventfd_read(self._stop))
        except BlockingIOError:
            return False

    def end(self) -> None:
        """Stop, and wait until the queue is empty."""
        os.eventfd_write(self._stop, 1)
        os.waitpid(self._pid, 0)
        os.close(self._stop)


class _Echo:
    """Answers an eventfd with another, in a process of its own."""

    def __init__(self) -> None:
        self._ask, self._answer = os.eventfd(0), os.eventfd(0)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                while os.eventfd_read(self._ask) < 1 << 20:
                    os.eventfd_write(self._answer, 1)
            finally:
                os._exit(0)

    def trip(self) -> None:
        """There and back."""
        os.eventfd_write(self._ask, 1)
        select.select([self._answer], [], [])
        os.eventfd_read(self._answer)

    def close(self) -> None:
        """End the process."""
        os.eventfd_write(self._ask, 1 << 20)
        os.waitpid(self._pid, 0)
        os.close(self._ask)
        os.close(self._answer)


def _statistics(part: Part, options: Options) -> None:
    """Measure from the operator's request, over the used buffer, to the driver's new buffer."""
    table = part.table(
        "Statistics: from the operator's command until the new figures can be read",
        "transport",
        "p50, us",
        "p99, us",
    )
    with (
        Backend("vhost-user") as one,
        Backend("vfio-user") as two,
        connect("vhost-user", one.socket) as vhost,
        connect("vfio-user", two.socket) as vfio,
    ):
        turns = {"vhost-user": _ask(one, vhost), "vfio-user": _ask(two, vfio)}
        found = interleaved(turns, TRIPS[options.form] // 10)
    for name, samples in found.items():
        values = [v * 1e6 for v in samples.values]
        part.keep(Samples(name, "us", values), load="statistics")
        table.rows.append([name, percentile(values, 50), percentile(values, 99)])
    part.notes.append(
        "Statistics over vfio-user / over vhost-user: "
        f"{ratio(found['vfio-user'], found['vhost-user']):.2f}."
    )


def _ask(backend: Backend, front: Front) -> Callable[[], float]:
    ring = front.rings[STATS]
    state: dict[str, Any] = {"value": 0, "buffer": None}

    def send() -> None:
        state["value"] += 1
        data = BalloonStat(tag=StatTag.MEMFREE, val=state["value"]).build()
        if state["buffer"] is None:
            state["buffer"] = front.place(data)
        addr, length = state["buffer"]
        front.memory.write(int(addr[0]), data)
        ring.fill(addr, length, writable=False)
        front.kick(STATS)

    send()

    def turn() -> float:
        start = clock()
        backend.ctl("set-guest-stats-interval", seconds=3600)
        front.wait(STATS)
        ring.drain()
        send()
        while backend.ctl("query-guest-stats")["stats"].get("stat-free-memory") != state["value"]:
            pass
        seconds = clock() - start
        backend.ctl("set-guest-stats-interval", seconds=0)
        return seconds

    return turn
