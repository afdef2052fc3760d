# SPDX-License-Identifier: Apache-2.0
"""``vballoon send``: move a running VM to another machine."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from vballoon.cli.common import Subparsers, add_command
from vballoon.cli.snapshot import (
    add_balloon_options,
    add_run_options,
    observer,
    settle,
    summary,
)
from vballoon.errors import UsageError

if TYPE_CHECKING:
    from vballoon.snapshot.link import Link

__all__ = ("add", "run")

EXAMPLES = """\
  vballoon send --qmp qmp.sock --control control.sock -- \\
          ssh elsewhere vballoon receive /var/tmp/vm1 -- qemu-system-x86_64 ...
      the VM moves; ssh carries the messages both ways
  vballoon send --qmp qmp.sock --control control.sock --to unix:/run/move.sock
      the same to 'vballoon receive --from unix:/run/move.sock', perhaps forwarded

The guest is stopped while it is sent and checked. QEMU here ends only when the guest runs there.
If the link breaks before COMMIT was sent, the guest runs on here. If it breaks
after that, it stays stopped here, and what to do is printed.
"""


def add(commands: Subparsers) -> None:
    """Declare the subcommand."""
    command = add_command(
        commands,
        "send",
        run,
        summary="move a running VM without its free memory",
        description=(
            "Send the VM at QEMU's monitor to 'vballoon receive', at the other end of COMMAND's\n"
            "standard input and output or of a Unix socket. It runs at one place only, ever."
        ),
        examples=EXAMPLES,
    )
    command.usage = "vballoon send [OPTION ...] [-- COMMAND ...]"
    command.add_argument("--qmp", metavar="SOCKET", required=True, help="QEMU's monitor")
    command.add_argument(
        "--control", metavar="SOCKET", required=True, help="control socket of 'vballoon serve'"
    )
    command.add_argument("--to", metavar="unix:PATH", help="a socket instead of a command")
    add_balloon_options(command)
    command.add_argument(
        "--silence",
        metavar="SECONDS",
        type=float,
        default=600.0,
        help="how long the other side may be silent, which includes its checking (default: 600)",
    )
    add_run_options(command)


def unix_path(text: str) -> str:
    """Return the path of ``unix:PATH``. Raise UsageError for anything else."""
    kind, _, path = text.partition(":")
    if kind != "unix" or not path:
        raise UsageError(f"{text}: unix:PATH is expected")
    return path


def run(options: argparse.Namespace) -> int:
    """Move the VM and print a summary. Return the exit status."""
    from vballoon.control.client import ControlClient
    from vballoon.snapshot.pipe import MoveStore
    from vballoon.snapshot.process import Process
    from vballoon.snapshot.qmp_vm import QemuVm
    from vballoon.snapshot.run import Options, Run
    from vballoon.snapshot.send import Sender
    from vballoon.snapshot.source import GuestSource
    from vballoon.snapshot.take import take

    if bool(options.command_line) == (options.to is not None):
        raise UsageError("either --to unix:PATH or a COMMAND after -- is needed")
    chosen = Options(
        device_id=options.device,
        device_socket=options.device_socket,
        unplug_seconds=options.unplug_timeout,
        move=True,
        quit=True,
        qemu_pid=options.qemu_pid,
        journal=options.journal or "",
    )
    with (
        QemuVm(options.qmp) as vm,
        ControlClient(options.control) as control,
        GuestSource.fetch(control, Process(options.qemu_pid or vm.pid)) as source,
    ):
        settle(control, options.settle)
        with _link(options) as link, observer(options.quiet) as watching:
            store = MoveStore(link)
            moving = Run(vm, source, store, chosen, watching, control=control)
            moving.sender = Sender(link, store)
            manifest = take(moving)
    if not options.quiet:
        summary(manifest, moving.seconds())
        print("the VM runs at its new place", file=sys.stderr)
    return 0


def _link(options: argparse.Namespace) -> Link:
    from vballoon.snapshot.link import Link

    if options.to is not None:
        return Link.connect(unix_path(options.to), silence=options.silence)
    return Link.run(options.command_line, silence=options.silence)
