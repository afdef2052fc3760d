# SPDX-License-Identifier: Apache-2.0
"""``vballoon serve``: serve the balloon on a socket until a signal stops it."""

from __future__ import annotations

import argparse
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

from vballoon.cli.common import Subparsers, add_command
from vballoon.errors import UsageError

if TYPE_CHECKING:
    from vballoon.keeper.listening import Listening

__all__ = ("add", "run")

EXAMPLES = """\
  vballoon serve --vhost-user balloon.sock --control control.sock
      then QEMU (10.2 or newer) with shared memory:
      -object memory-backend-memfd,id=mem,size=4G,share=on -machine q35,memory-backend=mem
      -chardev socket,id=c0,path=balloon.sock
      -device vhost-user-test-device-pci,chardev=c0,virtio-id=5,num_vqs=6,vq_size=128,config_size=24
  vballoon serve --vfio-user balloon.sock --control control.sock
      then QEMU (10.1 or newer) with shared memory, and
      -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"balloon.sock"}}'
  vballoon serve --vhost-user balloon.sock --no-discard
      do not discard, because a passed-through device has pinned guest memory
  vballoon serve --vhost-user balloon.sock --features=-FREE_PAGE_WALK
      leave out the walk extension; then config_size=16 and num_vqs=5 are enough
  vballoon serve --config vms.toml
      serve several virtual machines, each in a process of its own:
      [[vm]]
      vhost-user = "/run/vm1/balloon.sock"
      control = "/run/vm1/control.sock"
"""
LOG_LEVELS = ("debug", "info", "warning", "error")


def add(commands: Subparsers) -> None:
    """Declare the subcommand."""
    command = add_command(
        commands,
        "serve",
        run,
        summary="serve a balloon to QEMU",
        description=(
            "Serve a virtio memory balloon over vhost-user or vfio-user until SIGTERM or SIGINT.\n"
            "Stock QEMU cannot connect again: while the guest runs, do not stop the server before\n"
            "the device is unplugged."
        ),
        examples=EXAMPLES,
    )
    where = command.add_argument_group(
        "where to serve (exactly one)"
    ).add_mutually_exclusive_group()
    where.add_argument(
        "--vhost-user", "--socket-path", metavar="SOCKET", help="listen here for vhost-user"
    )
    where.add_argument("--vfio-user", metavar="SOCKET", help="listen here for vfio-user")
    where.add_argument(
        "--fd", metavar="N", type=int, help="serve vhost-user on this inherited descriptor"
    )
    where.add_argument(
        "--config", metavar="FILE", help="serve the machines described in this TOML file"
    )
    where.add_argument(
        "--print-capabilities",
        action="store_true",
        help="print the capabilities (vhost-user's back-end program conventions) and exit",
    )
    _add_device_options(command)
    _add_process_options(command)


def _add_device_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--control", metavar="SOCKET", help="listen here for the operator (QMP)")
    command.add_argument(
        "--client",
        action="store_true",
        help="connect to the --vhost-user socket, repeatedly, instead of listening",
    )
    command.add_argument(
        "--min", metavar="SIZE", help="lowest target (default: what the guest uses, plus a margin)"
    )
    command.add_argument("--max", metavar="SIZE", help="highest target")
    command.add_argument(
        "--memory",
        metavar="SIZE",
        help="the guest's memory, as in QEMU's -m; needed where the guest has memory that is not "
        "RAM (ivshmem) or not plugged (virtio-mem) and reports no statistics",
    )
    command.add_argument(
        "--no-discard",
        action="store_true",
        help="never discard guest memory; needed for guests with passed-through devices",
    )
    command.add_argument(
        "--features",
        metavar="LIST",
        default="",
        help="features to offer: names with + or - change the default, other names replace the "
        "balloon's; for example -FREE_PAGE_WALK,+RING_PACKED or MUST_TELL_HOST,PAGE_REPORTING",
    )
    command.add_argument(
        "--no-msix",
        action="store_true",
        help="offer no MSI-X over vfio-user: QEMU 11.1 aborts when a function with it is unplugged",
    )
    command.add_argument(
        "--engine",
        choices=("batch", "scalar"),
        default="batch",
        help="serve rings in batches with NumPy, or one buffer at a time (default: batch)",
    )


def _add_process_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--sandbox",
        choices=("on", "off", "log"),
        default="on",
        help="what a worker may do: on refuses what serving does not need, log only reports it",
    )
    command.add_argument(
        "--folder",
        action="append",
        dest="folders",
        metavar="DIR",
        default=[],
        help="let the worker write below this folder (exports); may be given several times",
    )
    command.add_argument(
        "--user", metavar="NAME", help="user to run the worker as; only root can change it"
    )
    command.add_argument(
        "--restart-limit",
        metavar="N",
        type=int,
        default=5,
        help="deaths of a worker in a minute after which no ring is served (default: 5)",
    )
    command.add_argument(
        "--no-keeper",
        action="store_true",
        help="serve in this process, for debuggers: it has no sandbox, and its end is the device's",
    )
    command.add_argument(
        "--log-level", choices=LOG_LEVELS, default="info", help="default: %(default)s"
    )


def run(options: argparse.Namespace) -> int:
    """Serve until a signal or the command quit; return the exit code."""
    if options.print_capabilities:
        print('{\n  "type": "balloon"\n}')
        return 0
    from vballoon.keeper.listening import Listening
    from vballoon.keeper.notifier import inherited

    machines = _machines(options)
    given = inherited()
    listening = Listening()
    for name, fd in given:
        if name.endswith((".listen", ".control")):
            listening.adopt(socket.socket(fileno=os.dup(fd)))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)  # until the loop takes over; removes the socket files
    try:
        for machine in machines:
            _listen(listening, machine)
        from vballoon.keeper.logs import set_up_logging

        set_up_logging(options.log_level)
        if options.no_keeper:
            from vballoon.cli import serving

            return serving.serve(machines, listening)
        from vballoon.keeper import supervisor

        start = {
            "log_level": options.log_level,
            "sandbox": options.sandbox,
            "restart_limit": options.restart_limit,
        }
        return supervisor.serve(machines, listening, given, **start)
    finally:
        listening.close()


def _end(number: int, frame: object) -> None:
    raise SystemExit(0)


def _listen(listening: Listening, machine: dict[str, Any]) -> None:
    if "control" in machine:  # a process that can write to it controls the balloon
        listening.open(machine["control"], private=True)
    if "vfio-user" in machine:
        listening.open(machine["vfio-user"])
    elif "vhost-user" in machine and not machine.get("client"):
        listening.open(machine["vhost-user"])


def _machines(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the options of each machine to serve.  Raise UsageError if they are inconsistent."""
    given: dict[str, Any] = {
        "vhost-user": options.vhost_user,
        "vfio-user": options.vfio_user,
        "fd": options.fd,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if options.config is not None:
        single = ["control", "client", "no_discard", "features", "no_msix", "folders", "user"]
        single += ["min", "max", "memory"]
        if any(getattr(options, name) for name in single) or options.engine != "batch":
            raise UsageError("with --config FILE, give all options but --log-level in the file")
        from pathlib import Path

        from vballoon.keeper.config import read_config

        return read_config(Path(options.config))
    from vballoon.sizes import parse_limits

    if not given:
        raise UsageError("serve: give one of --vhost-user, --vfio-user, --fd or --config")
    given |= {"client": options.client, "no-discard": options.no_discard}
    given |= {"features": options.features, "engine": options.engine}
    given |= {"no-msix": options.no_msix}
    given |= {
        name: getattr(options, name)
        for name in ("min", "max", "memory")
        if getattr(options, name) is not None
    }
    parse_limits(given)
    if options.folders:
        given["folders"] = options.folders
    if options.user:
        given["user"] = options.user
    if options.control:
        given["control"] = options.control
    return [given]
