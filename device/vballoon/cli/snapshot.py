# SPDX-License-Identifier: Apache-2.0
"""``vballoon snapshot``: a running VM into a directory, without its free memory."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from vballoon.cli.common import Subparsers, add_command, size_text
from vballoon.errors import UsageError

if TYPE_CHECKING:
    from vballoon.control.client import ControlClient
    from vballoon.snapshot.qmp_vm import QemuVm
    from vballoon.snapshot.source import GuestSource
    from vballoon.snapshot.store import Store
    from vballoon.snapshot.take import Observer, Snapshot
    from vballoon_spec.snapshot import SnapshotManifest

__all__ = ("add", "run")

QUIET_SECONDS = 2.5

EXAMPLES = """\
  vballoon snapshot --qmp qmp.sock --control control.sock snap/
      the guest stands still while its live pages are copied, then it runs on
  vballoon snapshot --qmp qmp.sock --control control.sock snap/ --quit
      the machine ends, to be restored elsewhere
  vballoon snapshot --qmp qmp.sock --control control.sock --output - --quit |
          ssh elsewhere vballoon restore - -- qemu-system-x86_64 ...
      the machine moves

QEMU needs a monitor that nobody else is connected to (-qmp unix:qmp.sock,server=on,wait=off),
shared memory, and the balloon where it can be unplugged: in any slot of -machine pc, or behind a
root port of q35. docs/migration.md has the whole story.
"""


def add(commands: Subparsers) -> None:
    """Declare the subcommand."""
    command = add_command(
        commands,
        "snapshot",
        run,
        summary="save a running VM without its free memory",
        description=(
            "Save the VM behind QEMU's monitor to a new DIRECTORY: its device state, and of its\n"
            "memory what is neither a hole nor, by the guest's own free lists, free."
        ),
        examples=EXAMPLES,
    )
    command.add_argument("directory", metavar="DIRECTORY", nargs="?", help="new, or empty")
    command.add_argument("--output", metavar="-", choices=("-",), help="a stream instead")
    command.add_argument("--qmp", metavar="SOCKET", required=True, help="QEMU's monitor")
    command.add_argument(
        "--control", metavar="SOCKET", required=True, help="control socket of 'vballoon serve'"
    )
    command.add_argument("--quit", action="store_true", help="end QEMU instead of resuming")
    command.add_argument("--device", metavar="ID", help="the balloon, where there are several")
    command.add_argument(
        "--device-socket", metavar="SOCKET", help="its socket, which QEMU does not tell (vfio-user)"
    )
    command.add_argument(
        "--unplug-timeout",
        metavar="SECONDS",
        type=float,
        default=20.0,
        help="how long the guest may take to let go of the balloon (default: 20)",
    )
    command.add_argument("--live", action="store_true", help="copy most of it while the guest runs")
    command.add_argument(
        "--settle",
        metavar="SECONDS",
        type=float,
        default=0.0,
        help="wait so long, at most, until the guest has reported what it has freed",
    )
    command.add_argument("--quiet", action="store_true", help="no progress, no summary")


def run(options: argparse.Namespace) -> int:
    """Take the snapshot and tell what it came to."""
    from vballoon.control.client import ControlClient
    from vballoon.snapshot.qmp_vm import QemuVm
    from vballoon.snapshot.source import GuestSource

    with (
        QemuVm(options.qmp) as vm,
        ControlClient(options.control) as control,
        GuestSource.fetch(control) as source,
    ):
        settle(control, options.settle)
        snapshot = _make(options, vm, control, source)
        with observer(options.quiet) as watching:
            snapshot.observer = watching
            manifest = snapshot.take()
    if not options.quiet:
        summary(manifest, snapshot.seconds())
    return 0


def _make(
    options: argparse.Namespace, vm: QemuVm, control: ControlClient, source: GuestSource
) -> Snapshot:
    from vballoon.snapshot.live import LiveSnapshot
    from vballoon.snapshot.take import Snapshot
    from vballoon.snapshot.tracker import SoftDirty, objections

    if options.live and (reason := objections()):  # before there is a directory
        raise UsageError(f"no live snapshot here: {reason}")
    store = _store(options)
    if options.live:
        snapshot: Snapshot = LiveSnapshot(
            vm,
            source,
            store,
            control=control,
            make_tracker=lambda blocks: SoftDirty(vm.pid, blocks),
        )
    else:
        snapshot = Snapshot(vm, source, store)
    snapshot.device_id = options.device
    snapshot.device_socket = options.device_socket
    snapshot.unplug_seconds = options.unplug_timeout
    snapshot.quit = options.quit
    return snapshot


def settle(control: ControlClient, seconds: float) -> None:
    """Wait until no more pages are reported for a while, at most *seconds*.

    Linux reports what was freed after 2 seconds, and then the next batch after 2 more.
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
        raise UsageError("a stream is not for the terminal: lead it into a pipe or a file")
    return StreamStore(sys.stdout.fileno())


def observer(quiet: bool) -> Observer:
    """Somebody to watch: a progress bar on a terminal, lines elsewhere."""
    from vballoon.cli.progress import Quiet, Watching

    return Quiet() if quiet else Watching()


def summary(manifest: SnapshotManifest, seconds: dict[str, float]) -> None:
    """A few lines for the operator, on standard error."""
    copied = sum(memory.data for memory in manifest.memory)
    total = sum(memory.size for memory in manifest.memory)
    left = manifest.left_out
    print(
        f"{size_text(copied)} of {size_text(total)} copied; left out: "
        f"{size_text(left['holes'])} of holes, {size_text(left['verified'])} of free pages",
        file=sys.stderr,
    )
    if "stopped" in seconds:
        print(f"the guest stood still for {seconds['stopped'] * 1000:.0f} ms", file=sys.stderr)
    if manifest.verification:
        print(f"free pages were copied, too: {manifest.verification}", file=sys.stderr)
