# SPDX-License-Identifier: Apache-2.0
"""One run in several processes: each takes every Nth test, and what they saw is put together."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict

from virtio_conformance.record import Record, Run

__all__ = ("run_jobs", "tell")

_MARK = "conformance-record "


def tell(record: Record, total: int) -> None:
    """Print one record for the parent process; for the progress hook of a job."""
    print(_MARK + json.dumps({"total": total, "record": asdict(record)}), flush=True)


def run_jobs(
    run: Run, count: int, words: Sequence[str], progress: Callable[[Record, int], None]
) -> int:
    """Run *count* shards with the suite's options *words*; fill *run*; return the worst status."""
    lock = threading.Lock()
    totals: dict[int, int] = {}
    statuses: list[int] = []

    def one(number: int) -> None:
        command = [sys.executable, "-m", "virtio_conformance.run", "--shard", f"{number}/{count}"]
        with subprocess.Popen([*command, *words], stdout=subprocess.PIPE, text=True) as job:
            assert job.stdout is not None
            for line in job.stdout:
                if not line.startswith(_MARK):
                    continue
                told = json.loads(line.removeprefix(_MARK))
                with lock:
                    totals[number] = told["total"]
                    run.records.append(Record(**told["record"]))
                    progress(run.records[-1], sum(totals.values()))
        statuses.append(job.returncode)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.records.sort(key=lambda record: record.name)
    return max(map(abs, statuses))
