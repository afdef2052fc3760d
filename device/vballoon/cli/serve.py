# SPDX-License-Identifier: Apache-2.0
"""``vballoon serve``: the balloon at the end of a socket, until it is told to stop."""

from __future__ import annotations

import argparse
import signal
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
      the guest's memory is pinned by a passed-through device
  vballoon serve --vhost-user balloon.sock --features=-FREE_PAGE_WALK
      without the walk extension: config_size=16 and num_vqs=5 will do
  vballoon serve --config vms.toml
      several virtual machines in one process:
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
    where = command.add_argument_group("where (exactly one)").add_mutually_exclusive_group()
    where.add_argument(
        "--vhost-user", "--socket-path", metavar="SOCKET", help="listen here for vhost-user"
    )
    where.add_argument("--vfio-user", metavar="SOCKET", help="listen here for vfio-user")
    where.add_argument(
        "--fd", metavar="N", type=int, help="vhost-user on this inherited descriptor"
    )
    where.add_argument("--config", metavar="FILE", help="several machines, described in TOML")
    where.add_argument(
        "--print-capabilities",
        action="store_true",
        help="print what vhost-user's conventions ask of a back-end program, and exit",
    )
    _add_options(command)


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--control", metavar="SOCKET", help="listen here for the operator (QMP)")
    command.add_argument(
        "--client",
        action="store_true",
        help="connect to the --vhost-user socket, again and again, instead of listening",
    )
    command.add_argument(
        "--no-discard",
        action="store_true",
        help="never free guest memory: for guests with passed-through devices",
    )
    command.add_argument(
        "--features",
        metavar="LIST",
        default="",
        help="what to offer: names with + or - change the default, names without replace the "
        "balloon's; for example -FREE_PAGE_WALK,+RING_PACKED or MUST_TELL_HOST,PAGE_REPORTING",
    )
    command.add_argument(
        "--no-msix",
        action="store_true",
        help="vfio-user without MSI-X: QEMU 11.1 ends when it unplugs a function that has it",
    )
    command.add_argument(
        "--engine",
        choices=("batch", "scalar"),
        default="batch",
        help="how rings are served: whole batches with NumPy, or step by step (default: batch)",
    )
    command.add_argument(
        "--log-level", choices=LOG_LEVELS, default="info", help="default: %(default)s"
    )


def run(options: argparse.Namespace) -> int:
    """Serve until told to stop."""
    if options.print_capabilities:
        print('{\n  "type": "balloon"\n}')
        return 0
    from vballoon.keeper.listening import Listening

    machines = _machines(options)
    listening = Listening()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)  # until the loop takes them over: the files go here, too
    try:
        for machine in machines:
            _listen(listening, machine)
        from vballoon.cli import serving

        serving.set_up_logging(options.log_level)
        return serving.serve(machines, listening)
    finally:
        listening.close()


def _end(number: int, frame: object) -> None:
    raise SystemExit(0)


def _listen(listening: Listening, machine: dict[str, Any]) -> None:
    if "control" in machine:  # whoever may write to it commands the balloon
        listening.open(machine["control"], private=True)
    if "vfio-user" in machine:
        listening.open(machine["vfio-user"])
    elif "vhost-user" in machine and not machine.get("client"):
        listening.open(machine["vhost-user"])


def _machines(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The machines to serve, each as the options that describe it."""
    given: dict[str, Any] = {
        "vhost-user": options.vhost_user,
        "vfio-user": options.vfio_user,
        "fd": options.fd,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if options.config is not None:
        single = ("control", "client", "no_discard", "features", "no_msix")
        if any(getattr(options, name) for name in single) or options.engine != "batch":
            raise UsageError("--config FILE takes everything but --log-level from the file")
        from pathlib import Path

        from vballoon.keeper.config import read_config

        return read_config(Path(options.config))
    if not given:
        raise UsageError("serve: one of --vhost-user, --vfio-user, --fd or --config is needed")
    given |= {"client": options.client, "no-discard": options.no_discard}
    given |= {"features": options.features, "engine": options.engine}
    given |= {"no-msix": options.no_msix}
    if options.control:
        given["control"] = options.control
    return [given]
