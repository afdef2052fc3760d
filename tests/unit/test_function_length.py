# SPDX-License-Identifier: Apache-2.0
"""No function outside the tests has more than 40 lines, in Python and in C."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.roots import REPOSITORY

LINES_MAX = 40
TOPS = ("device", "driver_kmod", "examples", "spec")


def sources() -> list[Path]:
    """Return the Python and C files outside the tests."""
    found = [p for top in TOPS for p in (REPOSITORY / top).rglob("*") if p.suffix in (".py", ".c")]
    return sorted(p for p in found if "tests" not in p.parts)


def functions(text: str, suffix: str) -> Iterator[tuple[str, int]]:
    """Yield name and length of each function in *text*, from its first line to its last."""
    if suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                yield node.name, node.end_lineno - node.lineno + 1
        return
    head, begin = "", 0
    for number, line in enumerate(text.split("\n"), 1):
        if line == "{":  # kernel style: only the braces of functions are alone in column 0
            begin = number - 1
        elif line == "}" and begin:
            yield head.partition("(")[0].split()[-1].lstrip("*"), number - begin + 1
            begin = 0
        elif not begin and line[:1].isalpha() and "(" in line:
            head = line


def too_long(path: Path) -> dict[str, int]:
    """Return the length of each function of *path* that has more than 40 lines."""
    place = path.relative_to(REPOSITORY)
    found = functions(path.read_text(), path.suffix)
    return {f"{place}:{name}": length for name, length in found if length > LINES_MAX}


def test_functions_are_short() -> None:
    found = {name: n for path in sources() for name, n in too_long(path).items()}
    assert found == {}


@pytest.mark.parametrize(
    ("text", "suffix", "expected"),
    [
        ("def f():\n" + "    a = 1\n" * 40, ".py", [("f", 41)]),
        ("class C:\n    async def g(self):\n        pass\n", ".py", [("g", 2)]),
        ("static int probe(int a,\n\t\t int b)\n{\n\treturn 0;\n}\n", ".c", [("probe", 4)]),
        ("struct s {\n\tint a;\n};\nvoid *f(void)\n{\n}\n", ".c", [("f", 3)]),
    ],
)
def test_planted_functions_are_measured(
    text: str, suffix: str, expected: list[tuple[str, int]]
) -> None:
    assert list(functions(text, suffix)) == expected
