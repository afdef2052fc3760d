# SPDX-License-Identifier: Apache-2.0
"""The program ``vballoon``: a module for each subcommand, and errors in one line.

A module declares its subcommand with ``add(subparsers)`` and loads what it needs when it runs, so
that no command waits for the libraries of another.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import vballoon
from vballoon.cli import bitmap, conform, ctl, export, map_, restore, serve, snapshot, status
from vballoon.errors import VballoonError

__all__ = ("main", "vhost_user_main")

PROLOGUE = """\
A virtio memory balloon outside the virtual machine monitor: give free guest memory back to the
host, and know which pages a snapshot or a migration may leave out."""

EPILOGUE = """\
examples:
  vballoon serve --vhost-user balloon.sock --control control.sock
                                        a balloon for QEMU, and a socket to command it
  vballoon status control.sock          what is connected, and what it does
  vballoon ctl control.sock balloon value=2G
                                        leave the guest 2 GiB
  vballoon map control.sock --png m.png a picture of the guest's memory
  vballoon export control.sock skip/    the skip bitmap as files

Each command has a --help of its own."""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="vballoon",
        description=PROLOGUE,
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (serve, ctl, status, map_, export, bitmap, snapshot, restore, conform):
        module.add(commands)
    return top


class _Version(argparse.Action):
    """Print the version and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"vballoon {vballoon.__version__}")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code (0 done, 1 failed, 2 wrong usage, 130 interrupted)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except VballoonError as error:
        print(f"vballoon: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # whoever read the output has seen enough; do not complain when Python flushes it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _run(words: list[str]) -> int:
    if words[:1] == ["conform"]:  # its options are not argparse's to know
        return conform.pass_on(words[1:])
    own, command = restore.split(words)  # what is behind -- is another program's
    options = parser().parse_args(own)
    options.command_line = command
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def vhost_user_main() -> int:
    """The program that vhost-user's conventions for back-end programs ask for.

    ``--socket-path PATH``, ``--fd NUMBER`` or ``--print-capabilities`` ("Backend program
    conventions", vhost-user.rst of QEMU 11.1), and everything else that ``vballoon serve`` takes.
    """
    return main(["serve", *sys.argv[1:]])
