# SPDX-License-Identifier: Apache-2.0
"""``vballoon doctor``: name what is wrong with a configuration, and what to do."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from vballoon.cli.common import Subparsers, add_command
from vballoon.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vballoon.control.diagnosis import Problem

__all__ = ("add", "run")

EXAMPLES = """\
  vballoon doctor control.sock                   ask the server
  vballoon doctor --qmp monitor.sock             ask QEMU
  vballoon doctor control.sock --qmp monitor.sock
"""
QMP_SECONDS = 5.0
"""Time limit in seconds for each answer."""
QEMU_MIN = (10, 1)


def add(commands: Subparsers) -> None:
    """Declare the subcommand."""
    command = add_command(
        commands,
        "doctor",
        run,
        summary="name what is wrong with a configuration, and what to do",
        description="Check a server, or QEMU, or both. The exit status is 0 if nothing is wrong, "
        "1 if a problem was found, and 2 if SOCKET or MONITOR cannot be used.",
        examples=EXAMPLES,
    )
    command.add_argument("socket", metavar="SOCKET", nargs="?", help="path of the control socket")
    command.add_argument("--qmp", metavar="MONITOR", help="path of a QMP monitor of QEMU")


def run(options: argparse.Namespace) -> int:
    """Print the problems; return 1 if there are any."""
    try:
        found = _found(options)
    except UsageError as error:
        print(f"vballoon: {error}", file=sys.stderr)
        return 2
    for problem in found:
        print(f"{problem.name}: {problem.what}\n    {problem.remedy}")
    if not found:
        print("no problem found")
    return 1 if found else 0


def _found(options: argparse.Namespace) -> list[Problem]:
    """Return the problems of what is given.  Raise UsageError if it cannot be asked."""
    if not (options.socket or options.qmp):
        raise UsageError("doctor: give a control socket, --qmp MONITOR, or both")
    found: list[Problem] = []
    if options.socket:
        from vballoon.control.client import ControlClient
        from vballoon.control.diagnosis import problems

        with ControlClient(options.socket) as client:
            found += problems(client.execute("query-status"))
    if options.qmp:
        found += _of_qemu(options.qmp)
    return found


def _of_qemu(path: str) -> Iterator[Problem]:
    """Yield what QEMU's monitor at *path* shows.  Raise UsageError if it cannot be asked."""
    from vballoon.control.client import ControlClient
    from vballoon.control.diagnosis import Problem

    why = f"{path}: no greeting: another client, such as libvirt, uses this monitor; add one with "
    why += "-qmp unix:PATH,server=on,wait=off"
    with ControlClient(path, timeout=QMP_SECONDS, no_greeting=why) as client:
        version = client.execute("query-version").get("qemu", {})
        number = version.get("major", 0), version.get("minor", 0)
        if number < QEMU_MIN:
            yield Problem(
                "old-qemu",
                f"this is QEMU {number[0]}.{number[1]}",
                "vfio-user-pci needs QEMU 10.1, and vhost-user-test-device-pci QEMU 10.2",
            )
        for backend in client.execute("query-memdev"):
            if not backend.get("share"):
                yield _not_shared(backend)


def _not_shared(backend: dict[str, Any]) -> Problem:
    from vballoon.control.diagnosis import Problem

    name = backend.get("id", "default")
    return Problem(
        "memory-not-shared",
        f"the memory backend {name} of QEMU is not shared",
        "use -object memory-backend-memfd,share=on,... with -machine memory-backend=ID",
    )
