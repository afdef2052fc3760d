# SPDX-License-Identifier: Apache-2.0
"""The server as a process: starting, idling, memory."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tests.bench.fronts import SPACE, Front, connect
from tests.bench.measure import Samples, clock, interleaved, ratio
from tests.bench.options import Options
from tests.bench.record import Part
from tests.lab.backend import TRANSPORTS, Backend

__all__ = ("cpu_seconds", "memory", "run")

MIB, GIB = 1 << 20, 1 << 30
IDLE_SECONDS = {"quick": 3, "short": 10, "full": 60}


def run(options: Options) -> Part:
    """Start, idle, memory."""
    part = Part("process", "The server process")
    part.notes.append(
        "`vballoon serve` as a process of its own, with the suite's own front-ends over real "
        "sockets; a guest of 4 GiB with five rings."
    )
    _start(part, options)
    table = part.table(
        "Idle, and memory with a 4 GiB guest after every page was reported and ballooned",
        "transport",
        "idle for",
        "CPU time used, ms",
        "context switches",
        "resident, MiB",
        "of it anonymous",
        "of it guest memory and bitmaps",
    )
    for transport in TRANSPORTS:
        _idle(part, options, transport, table.rows)
    return part


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, as the scheduler counts it (nanoseconds)."""
    return (
        sum(
            int(path.read_text().split()[0])
            for path in Path(f"/proc/{pid}/task").glob("*/schedstat")
        )
        * 1e-9
    )


def switches(pid: int) -> int:
    """Context switches of all threads."""
    texts = (p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/status"))
    return sum(int(n) for text in texts for n in re.findall(r"ctxt_switches:\s+(\d+)", text))


def memory(pid: int) -> dict[str, int]:
    """``VmRSS``, ``RssAnon``, ``RssFile``, ``RssShmem`` in bytes."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.findall(r"(VmRSS|Rss\w+):\s+(\d+) kB", text)
    return {name: int(kib) * 1024 for name, kib in found}


def _start(part: Part, options: Options) -> None:
    """From the start of the process until a front-end can connect."""

    def interpreter() -> float:
        start = clock()
        subprocess.run([sys.executable, "-c", "import numpy"], check=True)
        return clock() - start

    turns = {transport: lambda t=transport: _listening(t) for transport in TRANSPORTS}
    found = interleaved(turns | {"python -c 'import numpy'": interpreter}, min(options.turns, 15))
    table = part.table(
        "From start to listening", "what", "median, ms", "slowest, ms", "times numpy"
    )
    for name, samples in found.items():
        part.keep(samples, table="start")
        times = ratio(samples, found["python -c 'import numpy'"])
        table.rows.append([name, samples.median * 1e3, max(samples.values) * 1e3, times])
    for transport in TRANSPORTS:
        part.goal(f"start to listening, {transport}", found[transport].median, 0.4, unit="s")


def _listening(transport: str) -> float:
    backend = Backend(transport)
    start = clock()
    process = subprocess.Popen(backend.command(), stderr=subprocess.DEVNULL)
    try:
        while True:
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(backend.socket))
                    return clock() - start
                except OSError:
                    assert process.poll() is None, "vballoon serve ended"
                    time.sleep(0.001)
    finally:
        process.terminate()
        process.wait(10)


def _idle(part: Part, options: Options, transport: str, rows: list[list[object]]) -> None:
    seconds = IDLE_SECONDS[options.form]
    with Backend(transport) as backend, connect(transport, backend.socket, guest=4 * GIB) as front:
        _report_everything(front)
        time.sleep(1)
        cpu, switched = cpu_seconds(backend.pid), switches(backend.pid)
        time.sleep(seconds)
        used, switched = cpu_seconds(backend.pid) - cpu, switches(backend.pid) - switched
        rss = memory(backend.pid)
    part.keep(Samples("idle CPU", "s", [used]), transport=transport, seconds=seconds)
    part.keep(Samples("resident", "bytes", [rss["VmRSS"]]), transport=transport, detail=rss)
    rows.append(
        [transport, f"{seconds} s", used * 1e3, switched]
        + [rss[name] / MIB for name in ("VmRSS", "RssAnon", "RssShmem")]
    )
    part.goal(f"idle, {transport}: CPU used", used / seconds * 100, 0.01, unit="%")
    part.goal(f"resident with a 4 GiB guest, {transport}", rss["VmRSS"] / MIB, 80, unit="MiB")


def _report_everything(front: Front) -> None:
    """Report every block of 2 MiB after the rings' space, then balloon it page by page."""
    blocks = np.arange(SPACE, front.memory.end, 2 * MIB, dtype=np.uint64)
    for at in range(0, blocks.size, front.size):
        part = blocks[at : at + front.size]
        front.rings[4].fill(part, np.full(part.size, 2 * MIB), writable=True)
        front.kick(4)
        front.wait(4)
        front.rings[4].drain()
    pfns = np.arange(SPACE >> 12, front.memory.end >> 12, dtype="<u4").reshape(-1, 256)
    base = front.arena.take(1024 * front.size)
    addr = base + 1024 * np.arange(front.size)
    for at in range(0, len(pfns), front.size):
        part = pfns[at : at + front.size]
        front.memory.write(base, part.tobytes())
        front.rings[0].fill(addr[: len(part)], np.full(len(part), 1024), writable=False)
        front.kick(0)
        front.wait(0)
        front.rings[0].drain()
