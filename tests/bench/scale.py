# SPDX-License-Identifier: Apache-2.0
"""One process for many machines, and one process for each."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from tests.bench.fronts import SPACE, Front, connect
from tests.bench.measure import Samples, clock, quiet
from tests.bench.options import Options
from tests.bench.process import cpu_seconds
from tests.bench.record import Part

from virtio_formats.virtio import features as f

__all__ = ("run",)

MIB = 1 << 20
HINT, REPORT = 3, 4
SIZE = 128
COUNTS = (1, 10, 100)
SECONDS = {"quick": 1.0, "short": 3.0, "full": 8.0}
GUEST = 256 * MIB


def run(options: Options) -> Part:
    """1, 10, 100 front-ends."""
    part = Part("scale", "Scale")
    part.notes += [
        (
            "Each front-end is a guest of 256 MiB with five rings. The load: one front-end "
            "after the "
            f"other fills its reporting ring ({SIZE} reports) and kicks, all are kept busy, one "
            f"thread "
            "for all of them; the server runs without discarding, so that the kernel's work is "
            "left "
            "out. Buffers a second are of all machines together; memory is the server's "
            "proportional "
            "set size (`Pss`), so pages that processes share are not counted twice."
        ),
    ]
    table = part.table(
        "Served by `vballoon serve`",
        "machines",
        "processes",
        "buffers a second",
        "buffers a CPU second",
        "of one machine's",
        "memory, MiB",
        "memory a machine, MiB",
    )
    base: float | None = None
    for machines in COUNTS:
        for one_each in (False, True):
            if one_each and (machines == 1 or (machines == 100 and not options.full)):
                continue
            rates, per_cpu, mib = _measure(machines, one_each=one_each, options=options)
            rate = part.keep(Samples("buffers", "1/s", rates), machines=machines, one_each=one_each)
            cpu = part.keep(
                Samples("buffers a CPU second", "1/s", per_cpu),
                machines=machines,
                one_each=one_each,
            )
            base = base or cpu.median
            processes = machines if one_each else 1
            table.rows.append(
                [machines, processes, rate.median, cpu.median, cpu.median / base, mib,
                 mib / machines]
            )  # fmt: skip
            if machines == 100 and not one_each:
                part.goal(
                    "100 machines in one process: buffers a CPU second / one machine's",
                    cpu.median / base,
                    0.5,
                    at_most=False,
                    unit="x",
                )
                part.goal(
                    "memory for each of 100 machines in one process", mib / machines, 2, unit="MiB"
                )
    return part


def _measure(
    machines: int, *, one_each: bool, options: Options
) -> tuple[list[float], list[float], float]:
    """Buffers a second, buffers a CPU second of the servers (samples), and memory in MiB."""
    with _served(machines, one_each=one_each) as (pids, sockets), ExitStack() as stack:
        fronts = [
            stack.enter_context(connect("vhost-user", path, guest=GUEST, size=SIZE,
                ring_features=f.mask(f.VIRTIO_F_VERSION_1, f.VIRTIO_F_EVENT_IDX)))
            for path in sockets
        ]  # fmt: skip
        _load(fronts, 0.3)
        rates, per_cpu = [], []
        with quiet():
            for _ in range(5):
                cpu = sum(map(cpu_seconds, pids))
                buffers, seconds = _load(fronts, SECONDS[options.form] / 5)
                rates.append(buffers / seconds)
                per_cpu.append(buffers / (sum(map(cpu_seconds, pids)) - cpu))
        return rates, per_cpu, sum(map(_pss, pids)) / MIB


def _load(fronts: list[Front], seconds: float) -> tuple[int, float]:
    """Keep every front-end's reporting ring busy; buffers served, and the time taken."""
    addr = SPACE + MIB * np.arange(SIZE, dtype=np.uint64)
    length = np.full(SIZE, 64 * 1024)
    start, buffers = clock(), 0
    for front in fronts:
        _send(front, addr, length)
    while clock() - start < seconds:
        for front in fronts:
            front.wait(REPORT)
            while not front.rings[REPORT].done():
                front.wait(REPORT)
            buffers += front.rings[REPORT].drain()
            _send(front, addr, length)
    for front in fronts:
        while not front.rings[REPORT].done():
            front.wait(REPORT)
        front.pending(REPORT)
        buffers += front.rings[REPORT].drain()
    return buffers, clock() - start


def _send(front: Front, addr: np.ndarray, length: np.ndarray) -> None:
    ring = front.rings[REPORT]
    ring.fill(addr, length, writable=True)
    if ring.wants_kick():
        front.kick(REPORT)


@contextmanager
def _served(machines: int, *, one_each: bool) -> Iterator[tuple[list[int], list[Path]]]:
    """Servers; their process ids, and a socket for each machine."""
    with tempfile.TemporaryDirectory(prefix="vballoon-") as name:
        folder = Path(name)
        sockets = [folder / f"vm{i}.sock" for i in range(machines)]
        command = [sys.executable, "-m", "vballoon", "serve", "--log-level", "error"]
        if one_each:
            commands = [[*command, "--vhost-user", str(s), "--no-discard"] for s in sockets]
        else:
            tables = (f'[[vm]]\nvhost-user = "{s}"\nno-discard = true\n' for s in sockets)
            config = folder / "machines.toml"
            config.write_text("".join(tables))
            commands = [[*command, "--config", str(config)]]
        processes = [subprocess.Popen(c) for c in commands]
        try:
            deadline = time.monotonic() + 60
            while not all(s.exists() for s in sockets):
                assert time.monotonic() < deadline, "the servers do not listen"
                time.sleep(0.02)
            time.sleep(0.5)
            yield [p.pid for p in processes], sockets
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(20)


def _pss(pid: int) -> int:
    """Proportional set size in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Pss")
