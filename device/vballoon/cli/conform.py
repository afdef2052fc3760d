# SPDX-License-Identifier: Apache-2.0
"""``vballoon conform``: run the conformance suite on any back-end."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from vballoon.cli.common import Subparsers, add_command
from vballoon.errors import UsageError

__all__ = ("add", "pass_on")

SUITE = "virtio_conformance.run"
EXAMPLES = """\
  vballoon conform --help                     list the options of the suite
  vballoon conform --vhost-user backend.sock
"""


def add(commands: Subparsers) -> None:
    """Declare the subcommand for the list of commands; :func:`pass_on` handles its arguments."""
    add_command(
        commands,
        "conform",
        lambda options: pass_on([]),
        summary="check a vhost-user or vfio-user back-end against the standards",
        description="Run the conformance suite.",
        examples=EXAMPLES,
    )


def pass_on(arguments: Sequence[str]) -> int:
    """Run the suite, which has its own command line, and return its exit code."""
    try:
        suite = importlib.import_module(SUITE)
    except ModuleNotFoundError as error:
        raise UsageError(f"no module {error.name}: install virtio-conformance") from None
    code: int = suite.main(list(arguments))
    return code
