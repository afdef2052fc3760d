# SPDX-License-Identifier: Apache-2.0
"""``vballoon receive``: take a VM that ``vballoon send`` moves here."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vballoon.cli.common import Subparsers, add_command
from vballoon.cli.send import unix_path
from vballoon.errors import UsageError

if TYPE_CHECKING:
    from vballoon.snapshot.link import Link

__all__ = ("add", "run")

EXAMPLES = """\
  vballoon receive /var/tmp/vm1 -- qemu-system-x86_64 -machine q35,memory-backend=mem ...
      for 'vballoon send ... -- ssh here vballoon receive ...'
  vballoon receive --from unix:/run/move.sock /var/tmp/vm1 -- qemu-system-x86_64 ...
      wait for 'vballoon send --to unix:/run/move.sock'

The snapshot is complete, checked and synced in DIRECTORY before the sender gives the VM away.
DIRECTORY is removed when the VM runs.
"""


def add(commands: Subparsers) -> None:
    """Declare the subcommand."""
    command = add_command(
        commands,
        "receive",
        run,
        summary="take a VM that is moved here",
        description=(
            "Receive a VM into the new or empty DIRECTORY and run COMMAND, its QEMU command line,\n"
            "as soon as the sender has given it away. Otherwise print what to do."
        ),
        examples=EXAMPLES,
    )
    command.usage = "vballoon receive [OPTION ...] DIRECTORY -- COMMAND ..."
    command.add_argument("directory", metavar="DIRECTORY", type=Path, help="new, or empty")
    command.add_argument(
        "--from", dest="source", metavar="unix:PATH", help="listen there (default: standard input)"
    )
    command.add_argument(
        "--ram",
        metavar="FOLDER",
        type=Path,
        default=Path("/dev/shm"),
        help="where guest memory is kept (default: /dev/shm)",
    )
    command.add_argument("--balloon-socket", metavar="SOCKET", help="the balloon back-end's socket")
    command.add_argument(
        "--control", metavar="SOCKET", help="its control socket, to set the saved target again"
    )
    command.add_argument("--no-balloon", action="store_true", help="run without the balloon")
    command.add_argument("--keep", action="store_true", help="keep DIRECTORY when the VM runs")
    command.add_argument(
        "--silence",
        metavar="SECONDS",
        type=float,
        default=600.0,
        help="how long the other side may be silent (default: 600)",
    )


def run(options: argparse.Namespace) -> int:
    """Receive the VM and run it. Return QEMU's exit status."""
    from vballoon.cli.restore import run_vm
    from vballoon.snapshot.link import Link
    from vballoon.snapshot.move import Destination
    from vballoon.snapshot.receive import Receiver
    from vballoon.snapshot.restore import RamPlace

    if not options.command_line:
        raise UsageError("the command to run is missing: vballoon receive DIRECTORY -- COMMAND ...")
    directory = _make(options.directory)
    options.private = False
    with _link(options, Link) as link:
        receiver = Receiver(link, directory)

        def running() -> None:
            receiver.running()
            if not options.keep:
                shutil.rmtree(directory)

        place = RamPlace(options.ram)
        try:
            manifest = receiver.receive()
            receiver.wait_commit()
            try:
                place.fill(directory, manifest, verify=False)  # checked when received
                status = run_vm(options, directory, manifest, place, running=running)
            except UsageError as error:
                if receiver.state is Destination.COMMITTED:
                    receiver.refuse(f"the VM does not start: {error}")
                    _print_kept(directory)
                raise
        finally:
            place.remove()
            if receiver.state in (Destination.RECEIVING, Destination.DROPPED):
                shutil.rmtree(directory)
    return status


def _make(directory: Path) -> Path:
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        if any(directory.iterdir()):
            raise UsageError(f"{directory} is not empty")
    except OSError as error:
        raise UsageError(f"{directory}: {error.strerror}") from None
    return directory.resolve()


def _link(options: argparse.Namespace, kind: type[Link]) -> Link:
    if options.source is not None:
        return kind.listen(unix_path(options.source), silence=options.silence)
    reader, writer = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # QEMU's output is not for the link
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return kind(reader, writer, silence=options.silence)


def _print_kept(directory: Path) -> None:
    print(
        f"vballoon: the VM is complete in {directory} and has left its old place; run it with "
        f"'vballoon restore {directory} -- COMMAND'",
        file=sys.stderr,
    )
