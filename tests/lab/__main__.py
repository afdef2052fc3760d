# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.lab``: set the lab up, look at it, boot a guest by hand, build a module."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.lab import NAMES, LabError, Machine, build_module, cache, kernels, provision, qemu


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("setup", help="fetch whatever is missing")
    verbs.add_parser("status", help="what is there")
    verbs.add_parser("prerequisites", help="install the Debian packages that the tests call")
    for verb, text in (
        ("boot", "boot a guest, run a script in it"),
        ("shell", "boot a guest, run lines from the terminal"),
    ):
        each = verbs.add_parser(verb, help=text)
        each.add_argument("--kernel", choices=NAMES, default="6.12")
        each.add_argument("--machine", default="q35")
        each.add_argument("--memory", type=int, default=512, metavar="MIB")
        each.add_argument("--smp", type=int, default=1)
        each.add_argument("--append", default="", help="more kernel parameters")
        each.add_argument("--run", default="uname -a; free -m", help="shell text for the guest")
        each.add_argument("extra", nargs="*", help="after --: more arguments for QEMU")
    each = verbs.add_parser("build", help="build a kernel module")
    each.add_argument("kernel", choices=NAMES)
    each.add_argument("source", type=Path)
    each.add_argument("out", type=Path)
    each.add_argument("make", nargs="*", help="words for make, such as W=1")
    return parser


def _status(_: argparse.Namespace) -> None:
    missing = provision.prerequisites()
    print(f"cache          {cache.cache_dir()}")
    print(f"prerequisites  {'missing: ' + ' '.join(missing) if missing else 'installed'}")
    if not provision.is_ready(NAMES):
        print("lab            incomplete: run python -m tests.lab setup")
        return
    print(f"QEMU           {'.'.join(map(str, qemu.version()))}, {qemu.accelerator()}")
    for kernel in kernels():
        print(f"kernel         {kernel.name:<10} {kernel.version}")


def _machine(options: argparse.Namespace) -> Machine:
    return Machine(
        kernel=options.kernel,
        machine=options.machine,
        memory=options.memory,
        smp=options.smp,
        append=options.append,
        extra=options.extra,
    )


def _boot(options: argparse.Namespace) -> None:
    with _machine(options) as machine:
        cache.say(f"up after {machine.boot_seconds:.1f} s")
        print(machine.guest.sh(options.run))


def _shell(options: argparse.Namespace) -> None:
    with _machine(options) as machine:
        cache.say(f"up after {machine.boot_seconds:.1f} s; each line runs in the guest, ^D ends")
        for line in sys.stdin:
            result = machine.guest.run(line)
            sys.stdout.write((result.out + result.err).decode(errors="replace"))
            if result.status:
                print(f"[status {result.status}]")
            sys.stdout.flush()


def _build(options: argparse.Namespace) -> None:
    built = build_module(options.kernel, options.source, options.out, make=options.make)
    print(built.log, *built.modules, sep="\n")


def _prerequisites(_: argparse.Namespace) -> None:
    provision.install_prerequisites(provision.TEST_TOOLS)


VERBS = {
    "prerequisites": _prerequisites,
    "boot": _boot,
    "shell": _shell,
    "build": _build,
    "status": _status,
}


def main() -> int:
    """Run one verb; 1 and a line on standard error when it cannot be done."""
    options = _parser().parse_args()
    started = time.monotonic()
    try:
        if options.verb == "setup":
            provision.setup()
            cache.say(f"ready ({time.monotonic() - started:.1f} s)")
        else:
            VERBS[options.verb](options)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
