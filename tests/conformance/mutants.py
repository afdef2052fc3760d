# SPDX-License-Identifier: Apache-2.0
"""Does the suite find faults?  Run it over copies of our back-end, each with one seeded fault.

``python -m tests.conformance.mutants [ID ...]`` patches a copy of ``device/`` for every mutant of
``mutants.toml``, runs the files of the suite that ought to notice, and writes the table
``docs/conformance/mutants.md``.  A patch that does not fit any more is
an error: the list has to follow the code.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.roots import import_path

from virtio_conformance.record import Record, Run
from virtio_conformance.requirements import by_id

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("mutants.toml")
TABLE = ROOT / "docs" / "conformance" / "mutants.md"
FEATURES = "+RING_PACKED,+IN_ORDER,+EVENT_IDX,+INDIRECT_DESC"
PURE = "VBALLOON_NATIVE=0"
"""The compiled loops would hide faults in the code that they replace."""
ADVISORY = {"vu.log.exact"}
"""Rules of the suite that the device does not follow."""
STILLBORN = "the program does not start"
"""The result of a mutant whose program does not start, in place of a test name."""
WANTED = 0.95
"""The share of mutants that the suite has to catch."""


@dataclass
class Mutant:
    """One seeded fault, and what came of it."""

    id: str
    file: str
    what: str
    edits: list[dict[str, str]]
    only: list[str] = field(default_factory=list)
    protocol: str = "vhost-user"
    caught_by: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    observed: str = ""
    seconds: float = 0.0
    text: str = ""
    """The whole of the file, for a fault that is not given by edits."""

    def apply(self, device: Path) -> None:
        """Patch the copy; every old text has to be there exactly once."""
        path = device / self.file
        if self.text:
            path.write_text(self.text, encoding="utf-8")
            return
        text = path.read_text(encoding="utf-8")
        for edit in self.edits:
            if text.count(edit["old"]) != 1:
                raise ValueError(f"{self.id}: {edit['old'][:60]!r} is not once in {self.file}")
            text = text.replace(edit["old"], edit["new"])
        path.write_text(text, encoding="utf-8")


def mutants() -> list[Mutant]:
    """Return the list of mutants."""
    data = tomllib.loads(LIST.read_text(encoding="utf-8"))
    return [Mutant(**entry) for entry in data["mutant"]]


def judge(mutant: Mutant, *, thorough: bool = False) -> None:
    """Run the files that ought to notice (*thorough*: then all) until something fails.

    What fails has to pass on an unpatched copy, else it says nothing about the mutant.
    """
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        sound, device = Path(folder) / "sound", Path(folder) / "device"
        for copy in (sound, device):
            shutil.copytree(ROOT / "device", copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant.edits or mutant.text:
            mutant.apply(device)
        start = time.monotonic()
        results = Path(folder) / "results.json"
        for files in [mutant.only, []] if thorough and mutant.only else [mutant.only]:
            for _ in range(3):
                failed = failures(suite(mutant, device, files, results))
                if not failed:
                    break
                stillborn = failed[0].name == STILLBORN
                again = None if stillborn else suite(mutant, sound, [failed[0].name], results)
                if again is None or not failures(again) or not (mutant.edits or mutant.text):
                    mutant.caught_by = [record.name for record in failed]
                    mutant.observed = failed[0].observed.splitlines()[0]
                    mutant.broken = sorted({record.broken for record in failed} - {""})
                    break
            if mutant.caught_by:
                break
        mutant.seconds = time.monotonic() - start


def failures(run: Run) -> list[Record]:
    """Return the tests that failed or were inconclusive, except those of advisory rows."""
    return [
        record
        for record in run.records
        if record.outcome in ("failed", "inconclusive") and record.broken not in ADVISORY
    ]


def expect_sound(protocol: str) -> None:
    """Check that the suite passes an unpatched copy; otherwise its failures would mean nothing."""
    sound = Mutant("none", "", "", [], protocol=protocol)
    judge(sound)
    if sound.caught_by:
        raise SystemExit(f"without any fault {sound.caught_by[0]} fails over {protocol}")


def suite(mutant: Mutant, device: Path, files: list[str], results: Path) -> Run:
    """One run over a patched copy, ended by its first failure."""
    serve = f"vballoon serve --{mutant.protocol} {{socket}} --control {{dir}}/control"
    command = [sys.executable, "-m", "virtio_conformance.run", "--first", "--keep"]
    places = f"PYTHONPATH={import_path(device)}"
    command += ["--spawn", f"env {places} {PURE} {serve} --features={FEATURES}"]
    command += ["--config-change", "vballoon ctl {dir}/control balloon value={n}M force=on"]
    command += ["--hint-start", "vballoon ctl {dir}/control start-hinting"]
    command += ["--hint-done", "vballoon ctl {dir}/control stop-hinting"]
    command += ["--answer-limit", "6", "--time-limit", "30"]  # a busy machine is no finding
    command += ["--protocol", mutant.protocol, "--device", "balloon", "--json", str(results)]
    for file in files:
        command += ["--only", file]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = import_path()
    results.unlink(missing_ok=True)
    subprocess.run(command, stdout=subprocess.DEVNULL, env=environment)
    if not results.exists():  # it does not start, or does not answer
        record = Record(STILLBORN, "failed", broken="program.healthy", observed="nothing starts")
        return Run(mutant.protocol, "balloon", "", records=[record])
    return Run.load(results)


def table(judged: list[Mutant]) -> Iterator[str]:
    """Return the table as Markdown."""
    caught = sum(bool(mutant.caught_by) for mutant in judged)
    yield "# Mutants"
    yield ""
    yield "Generated by `python -m tests.conformance.mutants`; do not edit."
    yield ""
    yield f"{caught} of {len(judged)} seeded faults are caught."
    yield ""
    yield "| mutant | fault | caught by (first) | requirement |"
    yield "| --- | --- | --- | --- |"
    for mutant in judged:
        test = f"`{mutant.caught_by[0]}`" if mutant.caught_by else "**not caught**"
        rows = ", ".join(f"{row} ({by_id()[row].strength})" for row in mutant.broken[:3])
        yield f"| `{mutant.id}` | {mutant.what} | {test} | {rows} |"


def main() -> int:
    """Judge the named mutants, or all; write the table when it was all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids", nargs="*", help="mutants; all without one")
    parser.add_argument(
        "--resume", type=Path, help="keep verdicts in this file and continue from them"
    )
    parser.add_argument("--thorough", action="store_true", help="the whole suite, if need be")
    parser.add_argument("--trust", action="store_true", help="do not try an unpatched copy first")
    args = parser.parse_args()
    judged: list[Mutant] = []
    for protocol in () if args.ids or args.trust else ("vhost-user", "vfio-user"):
        expect_sound(protocol)
    stored = json.loads(args.resume.read_text()) if args.resume and args.resume.exists() else []
    known = {entry["id"]: entry for entry in stored}
    for mutant in mutants():
        if args.ids and mutant.id not in args.ids:
            continue
        if mutant.id in known:
            mutant = Mutant(**known[mutant.id])
        else:
            judge(mutant, thorough=args.thorough)
        judged.append(mutant)
        if args.resume:
            args.resume.write_text(json.dumps([asdict(one) for one in judged], indent=1))
        told = f"{mutant.caught_by[0]} {mutant.observed}" if mutant.caught_by else "NOT CAUGHT"
        print(f"{mutant.id}: {told} ({mutant.seconds:.0f} s)", flush=True)
    if not args.ids:
        TABLE.write_text("\n".join(table(judged)) + "\n", encoding="utf-8")
    caught = sum(bool(mutant.caught_by) for mutant in judged)
    print(f"{caught} of {len(judged)} caught")
    return 0 if caught >= WANTED * len(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
