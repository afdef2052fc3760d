# SPDX-License-Identifier: Apache-2.0
"""The files of the guest module call one another in one direction: who calls whom has no circle."""

from __future__ import annotations

import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

DRIVER = Path(__file__).resolve().parents[2] / "driver_kmod"

# A definition begins in the first column and, over one or more lines, ends with a brace.
_FUNCTION = re.compile(r"^(?!static\b)[a-z][\w \t*]*?\b(\w+)\([^;{}]*\)\n\{", re.MULTILINE)
_OBJECT = re.compile(r"^(?!static\b|extern\b)struct \w+ (\w+) = \{", re.MULTILINE)
_COMMENT = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\])*"', re.DOTALL)


def calls(folder: Path) -> dict[str, set[str]]:
    """Return for each C file those that define what it names, its own definitions left out."""
    texts = {p.name: _COMMENT.sub("", p.read_text()) for p in sorted(folder.glob("*.c"))}
    home = {
        name: file
        for file, text in texts.items()
        for name in (*_FUNCTION.findall(text), *_OBJECT.findall(text))
    }
    words = {file: set(re.findall(r"\w+", text)) for file, text in texts.items()}
    return {file: {home[word] for word in words[file] & home.keys()} - {file} for file in texts}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the files of one circle, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_no_circle() -> None:
    graph = calls(DRIVER)
    assert cycle(graph) == []
    # The test would pass if it found no calls, so it has to find what is known.
    assert {"device.c", "memmap.c"} <= graph["main.c"]
    assert {"push.c", "walk.c", "memmap.c", "work.c"} <= graph["session.c"]
    assert not graph["params.c"]


def test_a_circle_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.c").write_text("int one(void)\n{\n\treturn two();\n}\n")
    (tmp_path / "b.c").write_text("int two(void)\n{\n\treturn three;\n}\n")
    (tmp_path / "c.c").write_text("struct s three = {\n\t.call = one,\n};\n")
    assert set(cycle(calls(tmp_path))) == {"a.c", "b.c", "c.c"}


@pytest.mark.parametrize("path", sorted(DRIVER.glob("*.c")), ids=lambda path: path.name)
def test_each_file_includes_the_header_of_its_object(path: Path) -> None:
    """No umbrella header: what a file defines for others is declared in the header of its name."""
    text = _COMMENT.sub("", path.read_text())
    names = {*_FUNCTION.findall(text), *_OBJECT.findall(text)}
    if not names:
        return
    header = path.with_suffix(".h").read_text()
    assert {name for name in names if not re.search(rf"\b{name}\b", header)} == set()
    assert f'#include "{path.stem}.h"' in path.read_text()
