# SPDX-License-Identifier: Apache-2.0
"""Helpers of several subcommands: declaring them, and sizes in bytes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vballoon.sizes import parse_size, size_text

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Subparsers", "add_command", "parse_size", "size_text")

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subparsers = object


def add_command(
    commands: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Declare subcommand *name*, with a one-line *summary* and a --help with examples."""
    command = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples.rstrip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command
