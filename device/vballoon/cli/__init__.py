# SPDX-License-Identifier: Apache-2.0
"""The program ``vballoon``, with one module for each subcommand.

A module declares its subcommand with ``add(subparsers)``.  It imports libraries when the subcommand
runs, so that no command waits for the libraries of another.  Errors are printed as one line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import vballoon
from vballoon.cli import (
    bitmap,
    conform,
    ctl,
    doctor,
    export,
    map_,
    metrics,
    receive,
    restore,
    send,
    serve,
    snapshot,
    status,
    top,
)
from vballoon.errors import VballoonError

__all__ = ("main", "vhost_user_main")

PROLOGUE = """\
A virtio memory balloon outside the virtual machine monitor. It gives free guest memory back to the
host and records which pages a snapshot or a migration may leave out."""

EPILOGUE = """\
examples:
  vballoon serve --vhost-user balloon.sock --control control.sock
                                        serve a balloon to QEMU, with a control socket
  vballoon status control.sock          show the front-end, features, queues and counters
  vballoon ctl control.sock balloon value=2G
                                        deflate or inflate until the guest has 2 GiB
  vballoon map control.sock --png m.png write a picture of guest memory
  vballoon export control.sock skip/    write the skip bitmap to files

Run 'vballoon COMMAND --help' for the options of a command."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    program = argparse.ArgumentParser(
        prog="vballoon",
        description=PROLOGUE,
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    program.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = program.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (
        serve,
        ctl,
        status,
        doctor,
        top,
        metrics,
        map_,
        export,
        bitmap,
        snapshot,
        restore,
        send,
        receive,
        conform,
    ):
        module.add(commands)
    return program


class _Version(argparse.Action):
    """Print the version and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"vballoon {vballoon.__version__}")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return 0 (done), 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except VballoonError as error:
        print(f"vballoon: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader closed the pipe.  Avoid a second error when Python flushes the output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _run(words: list[str]) -> int:
    if words[:1] == ["conform"]:  # the suite parses its own options
        return conform.pass_on(words[1:])
    own, command = restore.split(words)  # the words after -- are another program's
    options = parser().parse_args(own)
    options.command_line = command
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def vhost_user_main() -> int:
    """Run ``vballoon serve`` under the name that ``50-vballoon.json`` gives.

    It takes ``--socket-path PATH``, ``--fd NUMBER`` and ``--print-capabilities`` (``Backend program
    conventions``, vhost-user.rst of QEMU 11.1), and all options of ``vballoon serve``.
    """
    return main(["serve", *sys.argv[1:]])
