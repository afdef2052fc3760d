# SPDX-License-Identifier: Apache-2.0
"""The command: run the suite on a backend and report."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ("main",)

PLUGIN = "virtio_conformance.plugin"
EPILOG = """\
examples:
  vballoon conform --vhost-user backend.sock
      the control plane of whatever listens there
  vballoon conform --vhost-user backend.sock --device blk --html report.html
  vballoon conform --spawn 'vballoon serve --vhost-user {socket}' --device balloon --keep
  vballoon conform --spawn 'vballoon serve --vfio-user {socket}' --protocol vfio-user
  vballoon conform --spawn '...' --only test_ring_malformed.py

The exit status is 0 if no requirement (MUST) is broken, 1 if one is, 2 for a wrong command line.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; 0 if no MUST is broken, 1 if one is, 2 for a wrong command line."""
    try:
        from virtio_conformance.options import OPTIONS
    except ModuleNotFoundError as missing:
        print(f"the suite needs the package {missing.name}: pip install {missing.name}")
        return 2
    parser = _parser()
    for name, how in OPTIONS.items():
        parser.add_argument(name, **how)
    args = parser.parse_args(argv)
    if not (args.vhost_user or args.vfio_user or args.spawn):
        parser.error("one of --vhost-user, --vfio-user or --spawn is needed")
    return _run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vballoon conform",
        description="Judge a vhost-user or vfio-user backend by the standards; no VM needed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="TEST", action="append", default=[],
                        help="a file, or file::test, of the suite; more than once")  # fmt: skip
    parser.add_argument("--first", action="store_true", help="stop at the first failure")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="tests by parts of names")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML")
    return parser


def _run(args: argparse.Namespace) -> int:
    import pytest
    from rich.console import Console

    from virtio_conformance.page import render
    from virtio_conformance.record import Recorder, Run
    from virtio_conformance.terminal import Progress, show
    from virtio_conformance.verdict import FAILED, verdicts

    protocol = "vhost-user" if args.vhost_user else "vfio-user" if args.vfio_user else args.protocol
    backend = args.spawn or args.vhost_user or args.vfio_user
    run, console = Run(protocol=protocol, device=args.device, backend=backend), Console()
    with Progress(console) as progress:
        recorder = Recorder(run, args.json, progress.step)
        code = int(pytest.main(_pytest_arguments(args), plugins=[recorder]))
    if code not in (0, 1):
        console.print(f"[red]nothing was tested (pytest's status is {code})")
        return 2
    found = verdicts(run)
    show(console, run, found)
    if args.html:
        args.html.write_text(render(run, found), encoding="utf-8")
    return int(any(verdict.status == FAILED for verdict in found))


def _pytest_arguments(args: argparse.Namespace) -> list[str]:
    suite = Path(__file__).parent / "suite"
    chosen = [str(suite / only) for only in args.only] or [str(suite)]
    words = ["-p", "no:terminal", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "timeout=0"]
    words += ["-o", "filterwarnings=", "--import-mode=importlib"]
    if not any(
        point.value == PLUGIN for point in importlib.metadata.entry_points(group="pytest11")
    ):
        words += ["-p", PLUGIN]
    words += ["-k", args.k] if args.k else []
    words += ["--maxfail=1"] if args.first else []
    words += [f"--junitxml={args.junit}"] if args.junit else []
    return [*words, *_forwarded(args), *chosen]


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
