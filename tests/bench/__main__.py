# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.bench``: measure, and write ``docs/benchmarks.{json,md}`` and the plots."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from tests.bench import record, report
from tests.bench.options import Options

PARTS = {
    "rings": "tests.bench.rings",
    "bitmap": "tests.bench.bitmap",
    "process": "tests.bench.process",
    "economy": "tests.bench.economy",
    "latency": "tests.bench.latency",
    "scale": "tests.bench.scale",
    "qemu": "tests.bench.against_qemu",
    "snapshot": "tests.bench.snapshot",
}
LAB = ("qemu", "snapshot")
"""The parts that boot virtual machines."""
DOCS = record.ROOT / "docs"


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--full", action="store_true", help="every size, many turns")
    form.add_argument("--quick", action="store_true", help="few turns, rough figures")
    parser.add_argument("--only", action="append", choices=PARTS, help="one part (repeat for more)")
    parser.add_argument("--no-lab", action="store_true", help="leave out what boots machines")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder to write to")
    parser.add_argument("--report", action="store_true", help="write page and plots again, no run")
    given = parser.parse_args()
    options = Options("full" if given.full else "quick" if given.quick else "short")
    names = (
        []
        if given.report
        else given.only or [name for name in PARTS if not (given.no_lab and name in LAB)]
    )
    target = given.out / "benchmarks.json"
    for name in names:
        print(f"{name} ({options.form}) …", flush=True)
        began = time.monotonic()
        part = importlib.import_module(PARTS[name]).run(options)
        whole = record.save(target, [part], options.form)
        print("\n".join(report.goal_lines(whole["parts"][name])))
        print(f"  {time.monotonic() - began:.0f} s", flush=True)
    _write(given.out)
    return 0


def _write(out: Path) -> None:
    from tests.bench import plots

    whole = record.load(out / "benchmarks.json")
    whole["parts"] = {name: whole["parts"][name] for name in PARTS if name in whole["parts"]}
    made = plots.draw(whole, out)
    report.write(whole, out / "benchmarks.md", Path(__file__).with_name("findings.md"), made)
    print(f"wrote {out / 'benchmarks.md'}")


if __name__ == "__main__":
    raise SystemExit(main())
