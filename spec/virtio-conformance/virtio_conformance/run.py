# SPDX-License-Identifier: Apache-2.0
"""The command: run the suite on a back-end and report."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from virtio_conformance.baseline import Baseline
    from virtio_conformance.record import Run
    from virtio_conformance.target import Options

__all__ = ("main",)

PROGRAM = "virtio-conformance"
PLUGIN = "virtio_conformance.plugin"
SUITE = Path(__file__).parent / "suite"
NOT_RUN = 2
EPILOG = """\
examples:
  virtio-conformance --vhost-user backend.sock
      the control plane of the back-end that listens there
  virtio-conformance --vhost-user backend.sock --device blk --html report.html
  virtio-conformance --spawn 'my-backend --socket {socket}' --device blk --jobs 4
  virtio-conformance --spawn 'my-server --vfio-user {socket}' --protocol vfio-user
  virtio-conformance --spawn '...' --only test_ring_malformed.py
  virtio-conformance --spawn '...' --write-baseline known.json
  virtio-conformance --spawn '...' --baseline known.json

exit status:
  0  no MUST of a specification is broken, and the back-end is robust
  1  a MUST of a specification is broken
  2  nothing was tested: a wrong command line, or no back-end
  3  no MUST is broken, but malformed input does harm (never with --no-robustness)
  4  nothing is found broken, but some tests were inconclusive: they failed in set-up
With --baseline only failures count that are not in the file.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; return the exit status that ``--help`` explains."""
    try:
        from virtio_conformance.options import OPTIONS
    except ModuleNotFoundError as missing:
        print(f"the suite needs the package {missing.name}: pip install {missing.name}")
        return NOT_RUN
    parser = _parser()
    for name, how in OPTIONS.items():
        parser.add_argument(name, **how)
    args = parser.parse_args(argv)
    fault = _fault(args)
    if fault:
        parser.error(fault)
    return _run_shard(args) if args.shard else _run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Test a vhost-user or vfio-user back-end against the standards; no VM needed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--version", action="version", version=_version())
    add(
        "--only",
        metavar="TEST",
        action="append",
        default=[],
        help="a file, or file::test, of the suite; can be given more than once",
    )
    add("--first", action="store_true", help="stop at the first failure")
    add("-k", metavar="EXPRESSION", default="", help="tests by parts of their names")
    add("--jobs", type=int, default=1, metavar="N", help="processes (needs --spawn; default: 1)")
    add("--html", type=Path, metavar="FILE", help="write a report page")
    add("--json", type=Path, metavar="FILE", help="write everything as JSON")
    add("--junit", type=Path, metavar="FILE", help="write JUnit XML")
    add("--baseline", type=Path, metavar="FILE", help="known failures, which do not count")
    add("--write-baseline", type=Path, metavar="FILE", help="write this run's failures there")
    add("--shard", default="", help=argparse.SUPPRESS)
    return parser


def _version() -> str:
    from virtio_conformance.requirements import VERSION, revisions

    try:
        suite = importlib.metadata.version(PROGRAM)
    except importlib.metadata.PackageNotFoundError:
        suite = "unknown"
    pinned = ", ".join(f"{name} {text[:12]}" for name, text in revisions().items())
    return f"{PROGRAM} {suite}, catalogue {VERSION} ({pinned})"


def _fault(args: argparse.Namespace) -> str:
    """Return what is wrong with the command line, before anything is started; empty for nothing."""
    if not (args.vhost_user or args.vfio_user or args.spawn):
        return "one of --vhost-user, --vfio-user or --spawn is needed"
    if args.jobs < 1 or (args.jobs > 1 and not args.spawn):
        return "--jobs needs --spawn and a number of 1 or more"
    try:
        shlex.split(args.spawn or "")
    except ValueError as error:
        return f"--spawn: {error}"
    for path in (args.html, args.json, args.junit, args.write_baseline):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            return f"{path} cannot be written: no such folder, or a folder itself"
    for only in args.only:
        if not (SUITE / only.partition("::")[0]).is_file():
            return f"--only: the suite has no {only}"
    try:
        args.known = _baseline(args)
    except ValueError as error:
        return f"--baseline: {error}"
    return ""


def _baseline(args: argparse.Namespace) -> Baseline | None:
    from virtio_conformance.baseline import Baseline

    return Baseline.load(args.baseline) if args.baseline else None


def _protocol(args: argparse.Namespace) -> str:
    chosen = "vhost-user" if args.vhost_user else "vfio-user" if args.vfio_user else args.protocol
    return str(chosen)


def _options(args: argparse.Namespace) -> Options:
    """Return what the probe needs to know."""
    from virtio_conformance.target import Options

    socket = "" if args.spawn else str(Path(args.vhost_user or args.vfio_user).absolute())
    return Options(
        protocol=_protocol(args),
        socket=socket,
        command=args.spawn or "",
        before=args.before,
        start_limit=args.start_limit,
        answer_limit=args.answer_limit,
    )


def _run(args: argparse.Namespace) -> int:
    """Probe the program, run the tests, and report."""
    from rich.console import Console

    from virtio_conformance.findings import NotStarted
    from virtio_conformance.probe import probe
    from virtio_conformance.record import Run

    console = Console()
    try:
        facts = probe(_options(args))
    except NotStarted as reason:
        console.print(f"nothing was tested: {reason}", markup=False, soft_wrap=True)
        return NOT_RUN
    backend = args.spawn or args.vhost_user or args.vfio_user
    run = Run(_protocol(args), args.device, backend, spec=args.spec)
    run.features = f"{facts.features:#x}"
    run.protocol_features = f"{facts.protocol_features:#x}" if facts.protocol_features else ""
    if not _run_tests(args, run, console):
        return NOT_RUN
    return _report(args, run, console)


def _run_tests(args: argparse.Namespace, run: Run, console: Console) -> bool:
    """Fill *run*; return false, after a line that says why, if nothing was tested."""
    import time

    from virtio_conformance.jobs import run_jobs
    from virtio_conformance.record import Recorder
    from virtio_conformance.terminal import Progress

    start = time.monotonic()
    with Progress(console) as progress:
        if args.jobs > 1:
            code, why = run_jobs(run, args.jobs, _job_arguments(args), progress.step), ""
        else:
            code, why = _pytest(args, Recorder(run, None, progress.step))
    run.seconds = time.monotonic() - start
    if code not in (0, 1) or not run.records:
        reason = why or f"no test was chosen (status {code})"
        console.print(f"nothing was tested: {reason}", markup=False, soft_wrap=True)
        return False
    return True


def _report(args: argparse.Namespace, run: Run, console: Console) -> int:
    """Write the reports and return the exit status."""
    from virtio_conformance.baseline import Baseline, failures
    from virtio_conformance.junit import render_junit
    from virtio_conformance.page import render
    from virtio_conformance.terminal import show, show_difference
    from virtio_conformance.verdict import exit_status, verdicts

    found = verdicts(run)
    if args.json:
        run.save(args.json)
    if args.html:
        args.html.write_text(render(run, found), encoding="utf-8")
    if args.junit:
        args.junit.write_text(render_junit(run), encoding="utf-8")
    if args.write_baseline:
        Baseline(failures(run)).save(args.write_baseline)
    show(console, run, found)
    if args.known is None:
        return exit_status(run, found)
    difference = args.known.compare(run)
    show_difference(console, difference)
    for verdict in found:
        verdict.failures = [
            record for record in verdict.failures if (verdict.row.id, record.name) in difference.new
        ]
    return exit_status(run, [verdict for verdict in found if verdict.failures])


def _run_shard(args: argparse.Namespace) -> int:
    """Run a part of the tests for :mod:`.jobs`, which reads what is printed."""
    from virtio_conformance.jobs import tell
    from virtio_conformance.record import Recorder, Run

    return _pytest(args, Recorder(Run(_protocol(args), args.device, ""), None, tell))[0]


def _pytest(args: argparse.Namespace, recorder: object) -> tuple[int, str]:
    """Run pytest; return its status and, where it did not run the tests, its last words."""
    import pytest

    words = io.StringIO()
    with contextlib.redirect_stderr(words):
        code = int(pytest.main(_pytest_arguments(args), plugins=[recorder]))
    return code, words.getvalue().strip()


def _pytest_arguments(args: argparse.Namespace) -> list[str]:
    chosen = [str(SUITE / only) for only in args.only] or [str(SUITE)]
    words = ["-p", "no:terminal", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "timeout=0"]
    words += ["-o", "filterwarnings=", "--import-mode=importlib", f"--rootdir={SUITE}"]
    points = importlib.metadata.entry_points(group="pytest11")
    if not any(point.value == PLUGIN for point in points):
        words += ["-p", PLUGIN]
    words += ["-k", args.k] if args.k else []
    words += ["--maxfail=1"] if args.first else []
    words += [f"--conformance-shard={args.shard}"] if args.shard else []
    return [*words, *_forwarded(args), *chosen]


def _job_arguments(args: argparse.Namespace) -> list[str]:
    """Return the command line of a job, without its shard."""
    words = [f"--only={only}" for only in args.only]
    words += [f"-k={args.k}"] if args.k else []
    words += ["--first"] if args.first else []
    return [*words, *_forwarded(args)]


def _forwarded(args: argparse.Namespace) -> list[str]:
    from virtio_conformance.options import OPTIONS

    words: list[str] = []
    for name, how in OPTIONS.items():
        value = getattr(args, name[2:].replace("-", "_"))
        if how.get("action") == "store_true":
            words += [name] if value else []
        elif value not in (None, ""):
            words.append(f"{name}={value}")
    return words


if __name__ == "__main__":
    sys.exit(main())
