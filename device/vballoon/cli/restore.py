# SPDX-License-Identifier: Apache-2.0
"""``vballoon restore``: a snapshot becomes a running VM again."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vballoon.cli.common import Subparsers, add_command
from vballoon.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vballoon.snapshot.restore import RamPlace
    from vballoon_spec.snapshot import SnapshotManifest

__all__ = ("add", "run", "split")

EXAMPLES = """\
  vballoon restore snap/ -- qemu-system-x86_64 -machine q35,memory-backend=mem ...
      run the command line with which the VM was started: its memory, its balloon and the
      state to load are seen to; then it runs on where it was
  vballoon restore snap/
      check the snapshot, fill files for the guest's memory, print the arguments
  vballoon restore snap/ --check
      only check it

The balloon's backend ('vballoon serve') must be there already; --balloon-socket names it where
it is not at the same path as before.
"""


def add(commands: Subparsers) -> None:
    """Declare the subcommand."""
    command = add_command(
        commands,
        "restore",
        run,
        summary="run a saved VM",
        description=(
            "Check the snapshot in DIRECTORY and run COMMAND, the VM's QEMU command line, so that\n"
            "it goes on where it was; without COMMAND, print what to add to it."
        ),
        examples=EXAMPLES,
    )
    command.usage = "vballoon restore [OPTION ...] DIRECTORY [-- COMMAND ...]"
    command.add_argument("directory", metavar="DIRECTORY", type=Path, help="of 'vballoon snapshot'")
    command.add_argument(
        "--ram",
        metavar="FOLDER",
        type=Path,
        default=Path("/dev/shm"),
        help="where the files of guest memory are made (default: /dev/shm)",
    )
    command.add_argument(
        "--balloon-socket", metavar="SOCKET", help="where the balloon's backend is, if elsewhere"
    )
    command.add_argument("--no-balloon", action="store_true", help="run without the balloon")
    command.add_argument("--no-verify", action="store_true", help="do not check memory's checksums")
    command.add_argument("--check", action="store_true", help="check the snapshot, do nothing else")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our words, and those of the command behind ``--``."""
    if words[:1] != ["restore"] or "--" not in words:
        return list(words), []
    at = words.index("--")
    return list(words[:at]), list(words[at + 1 :])


def run(options: argparse.Namespace) -> int:
    """Check, then run or print."""
    from vballoon.snapshot.restore import RamPlace
    from vballoon.snapshot.store import open_snapshot

    manifest = open_snapshot(options.directory, verify=not options.no_verify)
    if options.check:
        print(f"{options.directory} is a whole snapshot", file=sys.stderr)
        return 0
    place = RamPlace(options.ram)
    if not options.command_line:
        try:
            place.fill(options.directory, manifest)
        except BaseException:
            place.remove()
            raise
        _print(options, manifest, place)
        return 0
    with place:
        place.fill(options.directory, manifest)
        return _run(options, manifest, place)


def _print(options: argparse.Namespace, manifest: SnapshotManifest, place: RamPlace) -> None:
    from vballoon.snapshot.restore import balloon_arguments, printed_arguments

    words = printed_arguments(options.directory, manifest, place.files)
    device, _ = balloon_arguments(manifest, options.balloon_socket)
    print(shlex.join(words))
    print(
        "instead of the memory backends of the VM's command line, and without its balloon; "
        "then, on the monitor: cont, and device_add "
        + ",".join(f"{k}={v}" for k, v in device.items()),
        file=sys.stderr,
    )


def _run(options: argparse.Namespace, manifest: SnapshotManifest, place: RamPlace) -> int:
    from vballoon.snapshot.restore import plug_balloon, start

    with start(options.command_line, options.directory, manifest, place.files) as restored:
        restored.load(manifest)
        place.remove()
        if not options.no_balloon:
            try:
                plug_balloon(restored.vm, manifest, options.balloon_socket)
            except UsageError as error:
                print(f"vballoon: the VM runs, without its balloon: {error}", file=sys.stderr)
        print(f"restored {options.directory}", file=sys.stderr)
    status: int = restored.process.wait()
    return status if status >= 0 else 128 - status
