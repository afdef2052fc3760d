# SPDX-License-Identifier: Apache-2.0
"""docs/stability.md, kept: what an earlier version offered is still there and means the same.

``python -m tests.unit.test_stability NAME`` writes ``tests/unit/stable/NAME.json``, which is done
once for each release and not changed afterwards.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tests.unit.control_fakes import FakeBalloon, served

from vballoon.cli import parser
from vballoon.control import ControlClient
from vballoon.control.commands_snapshot import COMMANDS
from vballoon_spec.skipmap import manifest as skip_bitmap
from vballoon_spec.snapshot import manifest as snapshot

STABLE = Path(__file__).with_name("stable")
PAGE = Path(__file__).parents[2] / "docs" / "stability.md"
QUERIES: dict[str, dict[str, Any]] = {
    "query-balloon": {},
    "query-status": {},
    "query-guest-stats": {},
    "query-skip-bitmap": {},
    "query-round": {"kind": "hint"},
    "query-memory-map": {"cells": 8},
    "query-guest-memory": {},
}


def options() -> dict[str, dict[str, bool]]:
    """Return every subcommand's options: name to whether it takes a value."""
    found: dict[str, dict[str, bool]] = {}
    for action in parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                found[name] = {
                    word: option.nargs != 0
                    for option in command._actions
                    for word in option.option_strings
                    if option.help != argparse.SUPPRESS
                }
    return found


def commands() -> dict[str, dict[str, dict[str, Any]]]:
    """Return every command's arguments: name to type and whether it is optional."""
    return {
        command["name"]: {
            argument["name"]: {"type": argument["type"], "optional": argument["optional"]}
            for argument in command["arguments"]
        }
        for command in (command.describe() for command in COMMANDS.commands.values())
    }


def shape(value: Any) -> Any:
    """Return the members of an object, and of what is in it; a list is like its first entry."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in sorted(value.items())}
    if isinstance(value, list):
        return [shape(inner) for inner in value[:1]]
    return "number" if isinstance(value, int | float) else type(value).__name__


def replies(folder: Path) -> dict[str, Any]:
    """Return the shape of the reply to every query, from a server with a guest."""
    with served(folder / "c", FakeBalloon()), ControlClient(folder / "c", timeout=10) as client:
        client.execute("set-guest-stats-interval", {"seconds": 1})
        client.execute("start-hinting")
        return {name: shape(client.execute(name, words)) for name, words in QUERIES.items()}


def today(folder: Path) -> dict[str, Any]:
    """Return everything that is promised, as it is now."""
    return {"options": options(), "commands": commands(), "replies": replies(folder)}


def lost(before: Any, now: Any, where: str = "") -> list[str]:
    """Return what *before* had and *now* has not, or has otherwise."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = [f"{where}/{key}" for key in before if key not in now]
        for key in before.keys() & now.keys():
            found += lost(before[key], now[key], f"{where}/{key}")
        return found
    if isinstance(before, list) and isinstance(now, list):
        return lost(before[0], now[0], f"{where}[]") if before and now else []
    return [] if before == now or "NoneType" in (before, now) else [where]


def demanded(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return arguments that a command of *before* now needs in addition."""
    return [
        f"{name} {argument}"
        for name, arguments in now["commands"].items()
        if name in before["commands"]
        for argument, about in arguments.items()
        if not about["optional"] and argument not in before["commands"][name]
    ]


@pytest.mark.parametrize("version", sorted(STABLE.glob("*.json")), ids=lambda path: path.stem)
def test_what_was_there_is_still_there(version, tmp_path):
    before, now = json.loads(version.read_text(encoding="utf-8")), today(tmp_path)
    assert lost(before, now) == []
    assert demanded(before, now) == []


def test_a_change_is_seen():
    before = {"commands": {"a": {"x": {"type": "integer", "optional": True}}}, "replies": {"q": 1}}
    assert lost(before, {"commands": {"a": {}}, "replies": {"q": 1}}) == ["/commands/a/x"]
    assert lost(before, {"commands": before["commands"], "replies": {}}) == ["/replies/q"]
    more = {"commands": {"a": {"y": {"type": "integer", "optional": False}}}}
    assert demanded(before, more) == ["a y"]


def test_the_page_names_the_versions_of_the_formats():
    page = PAGE.read_text(encoding="utf-8")
    named = dict(re.findall(r"`(vballoon-[\w-]+)` version (\d+)", page))
    formats = (skip_bitmap, snapshot)
    assert named == {room.FORMAT_NAME: str(room.FORMAT_VERSION) for room in formats}


def main() -> None:
    """Write what is promised today under the name in the first argument."""
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(today(Path(folder)), indent=1, sort_keys=True)
    (STABLE / f"{sys.argv[1]}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
