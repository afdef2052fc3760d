# SPDX-License-Identifier: Apache-2.0
"""Kicks, interrupts and system calls for each buffer."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tests.bench.fronts import SPACE, Front, connect
from tests.bench.measure import Samples
from tests.bench.options import Options
from tests.bench.record import Part
from tests.lab.backend import TRANSPORTS, Backend

from virtio_formats.virtio import features as f

__all__ = ("run",)

MIB = 1 << 20
REPORT = 4
BATCHES = (1, 32, 1024)
PLAIN = f.mask(f.VIRTIO_F_VERSION_1)
EVENT = f.mask(f.VIRTIO_F_VERSION_1, f.VIRTIO_F_EVENT_IDX)
BUFFERS = {"quick": 4096, "short": 16384, "full": 65536}


def run(options: Options) -> Part:
    """Every batch size, with and without event index, on both transports."""
    part = Part("economy", "Kicks, interrupts, system calls")
    part.notes += [
        (
            "A batch: the driver makes so many one-block reports available, kicks once if it is "
            "asked to, and waits for the interrupt. Kicks and interrupts are what the server "
            "counted and what the driver got."
        ),
        (
            "System calls of the server (strace, which slows it), without a hole's own call "
            "(`fallocate`, one for each merged range). Where fewer kicks than batches are "
            "handled, the "
            "server was still looking when the next batch came."
        ),
    ]
    table = part.table(
        "For each batch of reports",
        "transport",
        "event index",
        "buffers a batch",
        "kicks handled",
        "interrupts",
        "interrupts a thousand buffers",
        "system calls a thousand buffers",
        "which",
    )
    worst = 0.0
    for transport in TRANSPORTS:
        for features in (PLAIN, EVENT):
            for batch in BATCHES:
                found = _economy(transport, features, batch, BUFFERS[options.form])
                has_event = features == EVENT
                for name in ("kicks", "interrupts", "calls"):
                    part.keep(
                        Samples(name, "per batch", [found[name] / found["batches"]]),
                        transport=transport,
                        event_idx=has_event,
                        batch=batch,
                    )
                kicks, interrupts = (found[n] / found["batches"] for n in ("kicks", "interrupts"))
                worst = max(worst, kicks, interrupts)
                thousand = 1000 / (found["batches"] * batch)
                table.rows.append(
                    [transport, "yes" if has_event else "no", batch, kicks, interrupts,
                     found["interrupts"] * thousand, found["calls"] * thousand, found["which"]]
                )  # fmt: skip
    part.goal("kicks handled and interrupts sent for each batch (the worst case)", worst, 1)
    return part


def _economy(transport: str, features: int, batch: int, buffers: int) -> dict[str, Any]:
    batches = max(4, min(buffers // batch, 400))
    with (
        Backend(transport) as backend,
        connect(transport, backend.socket, size=1024, ring_features=features) as front,
    ):
        _batch(front, batch)
        before = _queue(backend)
        trace = _Strace(backend.pid)
        got = sum(_batch(front, batch) for _ in range(batches))
        calls = trace.stop()
        after = _queue(backend)
    assert after["taken"] - before["taken"] == batch * batches
    assert got <= after["notified"] - before["notified"]
    calls.pop("fallocate", None)
    calls.pop("restart_syscall", None)
    ours = {name: count for name, count in calls.items() if count >= batches // 2}
    return {
        "batches": batches,
        "kicks": after["kicked"] - before["kicked"],
        "interrupts": after["notified"] - before["notified"],
        "calls": sum(calls.values()),
        "which": ", ".join(f"{name} {count / batches:.2g}" for name, count in ours.items())
        + " a batch",
    }


def _batch(front: Front, count: int) -> int:
    """One batch; the notifications that came."""
    ring = front.rings[REPORT]
    addr = SPACE + 2 * MIB * (np.arange(count, dtype=np.uint64) % 400)
    ring.fill(addr, np.full(count, 64 * 1024), writable=True)
    if ring.wants_kick():
        front.kick(REPORT)
    came = front.wait(REPORT)
    while not ring.done():
        came += front.wait(REPORT)
    ring.drain()
    return came


def _queue(backend: Backend) -> dict[str, int]:
    found: dict[str, int] = backend.ctl("query-status")["queues"][REPORT]
    return found


class _Strace:
    """Counts the system calls of a process."""

    def __init__(self, pid: int) -> None:
        if shutil.which("strace") is None:
            raise RuntimeError("system calls are counted with strace: install it")
        self._out = Path(tempfile.mkstemp(prefix="vballoon-strace-")[1])
        self._process = subprocess.Popen(
            ["strace", "-c", "-f", "-o", str(self._out), "-p", str(pid)], stderr=subprocess.PIPE
        )
        assert self._process.stderr is not None
        self._process.stderr.readline()  # "attached": from now on it counts
        time.sleep(0.05)

    def stop(self) -> dict[str, int]:
        """Return the number of calls by name."""
        self._process.terminate()
        self._process.wait(10)
        lines = self._out.read_text().splitlines()
        self._out.unlink()
        rows = [re.findall(r"\S+", line) for line in lines]
        return {
            row[-1]: int(row[3])
            for row in rows
            if len(row) >= 5 and row[3].isdigit() and row[-1] != "total"
        }
