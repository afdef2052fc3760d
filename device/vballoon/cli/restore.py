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
from typing import TYPE_CHECKING, Any

from vballoon.cli.common import Subparsers, add_command
from vballoon.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vballoon.snapshot.qmp_vm import QemuVm
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
  age -d -i KEY snap.age | vballoon restore - -- qemu-system-x86_64 ...
      a stream; its memory is unpacked to where the VM will use it

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
    command.add_argument(
        "--control",
        metavar="SOCKET",
        help="control socket of the balloon's back-end, to set the saved target again",
    )
    _add_ways(command)


def _add_ways(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--private",
        action="store_true",
        help="map the snapshot's files copy-on-write instead of copying them",
    )
    command.add_argument(
        "--commit",
        action="store_true",
        help="run a VM that was being moved here: it does not run at its old place",
    )
    command.add_argument("--no-verify", action="store_true", help="do not check memory's checksums")
    command.add_argument("--check", action="store_true", help="check the snapshot, do nothing else")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return our arguments, and the command after ``--``."""
    if words[:1] not in (["restore"], ["send"], ["receive"]) or "--" not in words:
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
    from vballoon.snapshot.receive import decide, require_decided
    from vballoon.snapshot.restore import RamPlace
    from vballoon.snapshot.store import open_snapshot

    at_once = options.check or options.private or in_place  # else while memory is filled
    manifest = open_snapshot(snapshot, verify=at_once and not options.no_verify)
    if options.check:
        print(f"{options.directory} is a whole snapshot", file=sys.stderr)
        return 0
    if options.commit:
        decide(snapshot)
    require_decided(snapshot)
    place = RamPlace(options.ram, anonymous=bool(options.command_line))
    if in_place or options.private:
        if not options.command_line:
            raise UsageError("--private needs the command to run")
        place.use(snapshot, manifest)
        return run_vm(options, snapshot, manifest, place, remove=not options.private)
    try:
        place.fill(snapshot, manifest, verify=not options.no_verify)
        if options.command_line:
            return run_vm(options, snapshot, manifest, place)
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


def run_vm(
    options: argparse.Namespace,
    snapshot: Path,
    manifest: SnapshotManifest,
    place: RamPlace,
    *,
    remove: bool = True,
    running: Callable[[], None] = lambda: None,
) -> int:
    """Run the command, call *running* when the guest runs, and return QEMU's exit status.

    *remove*: remove the files of *place* as soon as the guest runs.
    """
    from vballoon.snapshot.restore import balloon_arguments, start

    balloon = None if options.no_balloon else balloon_arguments(manifest, options.balloon_socket)
    if balloon is not None and options.private and "chardev" in balloon[0]:
        print(
            "vballoon: --private memory cannot be shared with a vhost-user back-end; the VM runs "
            "without its balloon",
            file=sys.stderr,
        )
        balloon = None
    with start(
        options.command_line, snapshot, manifest, place, private=options.private
    ) as restored:
        restored.load(manifest)
        running()
        if remove:
            place.remove()
        if balloon is not None:
            try:
                _plug(options, restored.vm, balloon, manifest)
            except UsageError as error:
                print(f"vballoon: the VM runs, without its balloon: {error}", file=sys.stderr)
        print(f"restored {snapshot}", file=sys.stderr)
        status: int = restored.process.wait()
    return status if status >= 0 else 128 - status


def _plug(
    options: argparse.Namespace, vm: QemuVm, balloon: Any, manifest: SnapshotManifest
) -> None:
    """Plug the balloon in and set the target that it had."""
    from vballoon.snapshot.device import plug
    from vballoon.snapshot.target import set_target

    plug(vm, *balloon)
    target = manifest.balloon.get("target")
    if target is None:
        return
    if options.control is None:
        print(
            f"vballoon: the balloon's target was {target} bytes; set it with 'vballoon ctl "
            f"SOCKET balloon value={target}', or restore with --control",
            file=sys.stderr,
        )
        return
    set_target(options.control, target)
