# SPDX-License-Identifier: Apache-2.0
"""``vballoon restore``: run a saved VM."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
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
      state to load are filled in; the VM continues where it was saved
  vballoon restore snap/
      check the snapshot, fill files for the guest's memory, print the arguments
  vballoon restore snap/ --check
      only check it
  ssh elsewhere vballoon snapshot ... --output - | vballoon restore - -- qemu-system-x86_64 ...
      a VM moves here; its memory is unpacked to where the VM will use it

The balloon's back-end ('vballoon serve') must be running. If its socket is at another path than
before, give it with --balloon-socket.
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
            "the VM continues where it was saved. Without COMMAND, print what to add to it."
        ),
        examples=EXAMPLES,
    )
    command.usage = "vballoon restore [OPTION ...] DIRECTORY [-- COMMAND ...]"
    command.add_argument(
        "directory", metavar="DIRECTORY", help="of 'vballoon snapshot', or - for a stream"
    )
    command.add_argument(
        "--ram",
        metavar="FOLDER",
        type=Path,
        default=Path("/dev/shm"),
        help="where the files of guest memory are made (default: /dev/shm)",
    )
    command.add_argument(
        "--balloon-socket", metavar="SOCKET", help="the balloon back-end's socket, if it has moved"
    )
    command.add_argument("--no-balloon", action="store_true", help="run without the balloon")
    command.add_argument("--no-verify", action="store_true", help="do not check memory's checksums")
    command.add_argument("--check", action="store_true", help="check the snapshot, do nothing else")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return our arguments, and the command after ``--``."""
    if words[:1] != ["restore"] or "--" not in words:
        return list(words), []
    at = words.index("--")
    return list(words[:at]), list(words[at + 1 :])


def run(options: argparse.Namespace) -> int:
    """Check the snapshot, then run or print the command. Return the exit status."""
    if options.directory != "-":
        return _restore(options, Path(options.directory), in_place=False)
    if not options.command_line and not options.check:
        raise UsageError("a stream needs the command to run: vballoon restore - -- COMMAND ...")
    return _restore_stream(options)


def _restore_stream(options: argparse.Namespace) -> int:
    """Unpack and run. A complete snapshot is kept until it runs: it may be the only copy."""
    from vballoon.snapshot.pipe import unpack

    try:
        folder = Path(tempfile.mkdtemp(prefix="vballoon-", dir=options.ram))
    except OSError as error:
        raise UsageError(f"{options.ram}: {error.strerror}") from None
    whole = False
    try:
        unpack(sys.stdin.fileno(), folder)
        whole = True
        return _restore(options, folder, in_place=True)
    finally:
        if whole and not options.check and any(folder.glob("*.ram")):
            print(f"vballoon: the received snapshot is kept in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder)


def _restore(options: argparse.Namespace, snapshot: Path, *, in_place: bool) -> int:
    from vballoon.snapshot.restore import RamPlace
    from vballoon.snapshot.store import open_snapshot

    manifest = open_snapshot(snapshot, verify=not options.no_verify)
    if options.check:
        print(f"{options.directory} is a whole snapshot", file=sys.stderr)
        return 0
    place = RamPlace(options.ram)
    if in_place:
        place.use(snapshot, manifest)
        return _run(options, snapshot, manifest, place)
    try:
        place.fill(snapshot, manifest)
        if options.command_line:
            return _run(options, snapshot, manifest, place)
        _print(options, snapshot, manifest, place)
        place.keep()
    finally:
        place.remove()
    return 0


def _print(
    options: argparse.Namespace, snapshot: Path, manifest: SnapshotManifest, place: RamPlace
) -> None:
    from vballoon.snapshot.restore import balloon_arguments, printed_arguments, printed_commands

    words = printed_arguments(snapshot, manifest, place.files)
    device, _ = balloon_arguments(manifest, options.balloon_socket)
    print(shlex.join(words))
    print(
        "instead of the memory backends of the VM's command line, and without its balloon "
        "(its -chardev stays); then, on a QMP monitor:",
        *map(json.dumps, printed_commands(device)),
        sep="\n",
        file=sys.stderr,
    )


def _run(
    options: argparse.Namespace, snapshot: Path, manifest: SnapshotManifest, place: RamPlace
) -> int:
    from vballoon.snapshot.device import plug
    from vballoon.snapshot.restore import balloon_arguments, start

    balloon = None if options.no_balloon else balloon_arguments(manifest, options.balloon_socket)
    with start(options.command_line, snapshot, manifest, place.files) as restored:
        restored.load(manifest)
        place.remove()
        if balloon is not None:
            try:
                plug(restored.vm, *balloon)
            except UsageError as error:
                print(f"vballoon: the VM runs, without its balloon: {error}", file=sys.stderr)
        print(f"restored {options.directory}", file=sys.stderr)
    status: int = restored.process.wait()
    return status if status >= 0 else 128 - status
