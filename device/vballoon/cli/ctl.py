# SPDX-License-Identifier: Apache-2.0
"""``vballoon ctl``: run one command of the control socket and print the reply as JSON."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from typing import TYPE_CHECKING, Any

from vballoon.cli.common import Subparsers, add_command, parse_size
from vballoon.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("add", "run")

EXAMPLES = """\
  vballoon ctl control.sock help
  vballoon ctl control.sock balloon value=2G
  vballoon ctl control.sock query-guest-stats
  vballoon ctl control.sock start-hinting --wait ROUND_COMPLETED
  vballoon ctl control.sock query-skip-bitmap
"""


def add(commands: Subparsers) -> None:
    """Declare the subcommand."""
    command = add_command(
        commands,
        "ctl",
        run,
        summary="run a command on a control socket",
        description=(
            "Run one command on the control socket of a running 'vballoon serve' and print its\n"
            "reply as JSON. The socket speaks QMP, so qmp-shell and every QMP client also work."
        ),
        examples=EXAMPLES,
    )
    command.add_argument("socket", metavar="SOCKET", help="path of the control socket")
    command.add_argument("command", metavar="COMMAND", help="a command, or 'help' to list them")
    command.add_argument(
        "arguments",
        metavar="KEY=VALUE",
        nargs="*",
        help="arguments; numbers may end in K, M, G or T, and a directory may be relative",
    )
    command.add_argument("--wait", metavar="EVENT", help="then wait for this event and print it")
    command.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=60.0,
        help="how long to wait for the reply, and for the event (default: 60)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command and print the reply."""
    from vballoon.control.client import ControlClient

    with ControlClient(options.socket, options.timeout) as client:
        known = {c["name"]: c for c in client.execute("query-commands")}
        if options.command == "help":
            print("\n".join(describe(c) for c in known.values() if c["name"] in known))
            return 0
        declared = _find(known, options.command)
        arguments = parse_arguments(options.arguments, declared.get("arguments", []))
        _print(client.execute(options.command, arguments))
        if options.wait:
            try:
                _print(client.wait_event(options.wait, options.timeout))
            except TimeoutError:
                raise UsageError(f"no {options.wait} within {options.timeout:g} s") from None
    return 0


def _print(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _find(known: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = known[name]
    except KeyError:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "run 'help' to list the commands"
        raise UsageError(f"unknown command {name!r}; {hint}") from None
    return found


def parse_arguments(given: Sequence[str], declared: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return ``key=value`` words as the JSON arguments that the command declares."""
    kinds = {argument["name"]: argument["type"] for argument in declared}
    arguments: dict[str, Any] = {}
    for word in given:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r} is not of the form KEY=VALUE")
        if key not in kinds:
            names = ", ".join(kinds) or "none"
            raise UsageError(f"unknown argument {key!r}; this command takes: {names}")
        arguments[key] = _value(key, text, kinds[key])
    return arguments


def _value(key: str, text: str, kind: str) -> Any:
    if kind == "integer":
        try:
            return parse_size(text)
        except ValueError:
            raise UsageError(
                f"{key}: {text!r} is not a number; write it as 4096, 512M or 2G"
            ) from None
    if kind == "boolean":
        try:
            return {"true": True, "on": True, "false": False, "off": False}[text.lower()]
        except KeyError:
            raise UsageError(f"{key}: {text!r} is not a truth value; write true or false") from None
    return os.path.abspath(text) if key == "directory" else text


def describe(command: dict[str, Any]) -> str:
    """Return a command of ``query-commands`` as text."""
    lines = [f"{command['name']}\n    {command.get('help', '')}"]
    for argument in command.get("arguments", []):
        optional = ", optional" if argument["optional"] else ""
        lines.append(f"    {argument['name']}=  ({argument['type']}{optional}) {argument['help']}")
    return "\n".join(lines)
