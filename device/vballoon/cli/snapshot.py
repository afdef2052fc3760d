# SPDX-License-Identifier: Apache-2.0
"""``vballoon snapshot``: save a running VM to a directory, without its free memory."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from vballoon.cli.common import Subparsers, add_command, size_text
from vballoon.errors import UsageError

if TYPE_CHECKING:
    from vballoon.control.client import ControlClient
    from vballoon.snapshot.run import Observer, Options
    from vballoon.snapshot.store import Store
    from vballoon_spec.snapshot import SnapshotManifest

__all__ = ("add", "run")

QUIET_SECONDS = 2.5

EXAMPLES = """\
  vballoon snapshot --qmp qmp.sock --control control.sock snap/
      the guest is stopped while its live pages are copied, then it runs on
  vballoon snapshot --qmp qmp.sock --control control.sock snap/ --quit
      the machine ends, to be restored elsewhere
  vballoon snapshot --qmp qmp.sock --control control.sock --output - | age -r KEY >snap.age
      a stream, encrypted by a filter

QEMU needs a monitor to which no other client is connected (-qmp unix:qmp.sock,server=on,wait=off),
shared memory, and the balloon where it can be unplugged: in any slot of -machine pc, or on a
root port of q35. See docs/migration.md for details.
"""


def add(commands: Subparsers) -> None:
    """Declare the subcommand."""
    command = add_command(
        commands,
        "snapshot",
        run,
        summary="save a running VM without its free memory",
        description=(
            "Save the VM at QEMU's monitor to a new DIRECTORY: its device state, and all pages\n"
            "of its memory that are neither holes nor in the guest's free lists."
        ),
        examples=EXAMPLES,
    )
    command.add_argument("directory", metavar="DIRECTORY", nargs="?", help="new, or empty")
    command.add_argument("--output", metavar="-", choices=("-",), help="a stream instead")
    command.add_argument("--qmp", metavar="SOCKET", required=True, help="QEMU's monitor")
    command.add_argument(
        "--control", metavar="SOCKET", help="control socket of 'vballoon serve' (needed to save)"
    )
    command.add_argument("--quit", action="store_true", help="end QEMU instead of resuming")
    add_balloon_options(command)
    command.add_argument(
        "--undo", action="store_true", help="undo an earlier snapshot that was killed"
    )
    decision = command.add_mutually_exclusive_group()
    decision.add_argument(
        "--abort", action="store_true", help="with --undo: the VM was sent but does not run there"
    )
    decision.add_argument(
        "--commit", action="store_true", help="with --undo: the VM was sent or saved; end QEMU here"
    )
    command.add_argument("--live", action="store_true", help="copy most of it while the guest runs")
    command.add_argument(
        "--hint",
        action="store_true",
        help="with --live: have a guest without the module hint its free pages; do not use it for "
        "guests with init_on_alloc, which write each page that they hint",
    )
    add_run_options(command)


def add_balloon_options(command: argparse.ArgumentParser) -> None:
    """Declare the options for finding and unplugging the balloon, also for ``send``."""
    command.add_argument("--device", metavar="ID", help="the balloon, if there are several")
    command.add_argument(
        "--device-socket",
        metavar="SOCKET",
        help="its back-end's socket (QEMU does not report that of vfio-user)",
    )
    command.add_argument(
        "--unplug-timeout",
        metavar="SECONDS",
        type=float,
        default=20.0,
        help="how long the guest may take to release the balloon (default: 20)",
    )
    command.add_argument(
        "--qemu-pid",
        metavar="PID",
        type=int,
        default=0,
        help="QEMU's process, if another one has opened the monitor's socket for it",
    )


def add_run_options(command: argparse.ArgumentParser) -> None:
    """Declare the options for the journal, for waiting and for output, also for ``send``."""
    command.add_argument(
        "--journal", metavar="FILE", help="the journal (default: the monitor's socket, + .journal)"
    )
    command.add_argument(
        "--settle",
        metavar="SECONDS",
        type=float,
        default=0.0,
        help="first wait until the guest has reported what it has freed, at most so long",
    )
    command.add_argument("--quiet", action="store_true", help="no progress, no summary")


def run(options: argparse.Namespace) -> int:
    """Take the snapshot and print a summary. Return the exit status."""
    from vballoon.control.client import ControlClient
    from vballoon.snapshot.process import Process
    from vballoon.snapshot.qmp_vm import QemuVm
    from vballoon.snapshot.run import Run
    from vballoon.snapshot.source import GuestSource
    from vballoon.snapshot.take import take
    from vballoon.snapshot.tracker import SoftDirty, objections

    if options.undo or options.abort or options.commit:
        return _undo(options)
    _check(options)
    if options.live and (reason := objections()):  # before there is a directory
        raise UsageError(f"no live snapshot here: {reason}")
    with (
        QemuVm(options.qmp) as vm,
        ControlClient(options.control) as control,
        GuestSource.fetch(control, Process(options.qemu_pid or vm.pid)) as source,
    ):
        settle(control, options.settle)
        with observer(options.quiet) as watching:
            snapshot = Run(
                vm,
                source,
                _store(options),
                _chosen(options),
                watching,
                control=control,
                make_tracker=lambda blocks: SoftDirty(options.qemu_pid or vm.pid, blocks),
            )
            manifest = take(snapshot)
    if not options.quiet:
        summary(manifest, snapshot.seconds())
    return 0


def _chosen(options: argparse.Namespace) -> Options:
    from vballoon.snapshot.run import Options

    return Options(
        device_id=options.device,
        device_socket=options.device_socket,
        unplug_seconds=options.unplug_timeout,
        live=options.live,
        hint=options.hint,
        quit=options.quit,
        qemu_pid=options.qemu_pid,
        journal=options.journal or "",
    )


def _check(options: argparse.Namespace) -> None:
    """Raise UsageError if *options* cannot save a VM."""
    if options.control is None:
        raise UsageError("--control is needed to save a VM")
    if options.output is not None and options.quit:
        raise UsageError(
            "a stream has no acknowledgement, so QEMU cannot end after it: a link that breaks with "
            "the last bytes would lose the VM; move it with 'vballoon send'"
        )


def _undo(options: argparse.Namespace) -> int:
    """Undo a killed snapshot. Return 1 if something could not be undone."""
    from vballoon.snapshot.recovery import undo_file

    decision = "abort" if options.abort else "commit" if options.commit else ""
    troubles = undo_file(options.journal or f"{options.qmp}.journal", decision=decision)
    for trouble in troubles:
        print(f"vballoon: {trouble}", file=sys.stderr)
    return 1 if troubles else 0


def settle(control: ControlClient, seconds: float) -> None:
    """Wait until the guest reports no more pages for a while, at most *seconds*.

    Linux reports freed pages after 2 seconds, and the next batch after another 2.
    """
    deadline = time.monotonic() + seconds
    last, since = -1, time.monotonic()
    while (now := time.monotonic()) < deadline and now - since < QUIET_SECONDS:
        pages = control.execute("query-status")["counters"]["reported-pages"]
        if pages != last:
            last, since = pages, now
        time.sleep(0.1)


def _store(options: argparse.Namespace) -> Store:
    from vballoon.snapshot.pipe import StreamStore
    from vballoon.snapshot.store import DirectoryStore

    if (options.directory is None) == (options.output is None):
        raise UsageError("either a DIRECTORY or --output - is needed")
    if options.directory is not None:
        return DirectoryStore(options.directory)
    if sys.stdout.isatty():
        raise UsageError("refusing to write a stream to a terminal; redirect it")
    return StreamStore(sys.stdout.fileno())


def observer(quiet: bool) -> Observer:
    """Return what shows the progress: a bar on a terminal, lines elsewhere."""
    from vballoon.cli.progress import Quiet, Watching

    return Quiet() if quiet else Watching()


def summary(manifest: SnapshotManifest, seconds: dict[str, float]) -> None:
    """Print a few lines for the operator on standard error."""
    copied = sum(memory.data for memory in manifest.memory)
    total = sum(memory.size for memory in manifest.memory)
    left = manifest.left_out
    print(
        f"{size_text(copied)} of {size_text(total)} copied; left out: "
        f"{size_text(left['holes'])} of holes, {size_text(left['verified'])} of free pages",
        file=sys.stderr,
    )
    if "stopped" in seconds:
        print(f"the guest was stopped for {seconds['stopped'] * 1000:.0f} ms", file=sys.stderr)
    if manifest.verification:
        print(f"free pages were copied as well: {manifest.verification}", file=sys.stderr)
