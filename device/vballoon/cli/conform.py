# SPDX-License-Identifier: Apache-2.0
"""``vballoon conform``: the conformance suite, on any backend."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from vballoon.cli.common import Subparsers, add_command
from vballoon.errors import UsageError

__all__ = ("add", "pass_on")

SUITE = "virtio_conformance.run"
EXAMPLES = """\
  vballoon conform --help                     what the suite takes
  vballoon conform --vhost-user backend.sock
"""


def add(commands: Subparsers) -> None:
    """Declare the subcommand, for the list of commands: :func:`pass_on` gets what follows it."""
    add_command(
        commands,
        "conform",
        lambda options: pass_on([]),
        summary="judge a vhost-user or vfio-user backend by the standards",
        description="Run the conformance suite.",
        examples=EXAMPLES,
    )


def pass_on(arguments: Sequence[str]) -> int:
    """Hand over to the suite, which has a command line of its own."""
    try:
        suite = importlib.import_module(SUITE)
    except ModuleNotFoundError as error:
        raise UsageError(f"the conformance suite cannot run: no module {error.name}") from None
    code: int = suite.main(list(arguments))
    return code
