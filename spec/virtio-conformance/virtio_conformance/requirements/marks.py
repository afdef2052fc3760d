# SPDX-License-Identifier: Apache-2.0
"""Find which conformance test checks which requirement, from the marks of the tests.

``python -m virtio_conformance.requirements.marks`` writes the ``tests`` lines of the catalogue;
a unit test fails while they differ from the marks.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from virtio_conformance.requirements import CHAPTERS

__all__ = ("SUITE", "marked_tests", "named_rows", "sync")

SUITE = Path(__file__).parent.parent / "suite"


def marked_tests(suite: Path = SUITE) -> dict[str, list[str]]:
    """Return requirement id → sorted ``file.py::test`` names, from the requirement marks."""
    found: dict[str, list[str]] = {}
    for path in sorted(suite.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for requirement in _marks(node):
                    found.setdefault(requirement, []).append(f"{path.name}::{node.name}")
    return {requirement: sorted(set(tests)) for requirement, tests in found.items()}


def _marks(node: ast.FunctionDef) -> list[str]:
    calls = [d for d in node.decorator_list if isinstance(d, ast.Call)]
    wanted = [call for call in calls if ast.unparse(call.func) == "pytest.mark.requirement"]
    return [str(ast.literal_eval(argument)) for call in wanted for argument in call.args]


def named_rows(folder: Path) -> list[str]:
    """Return the rows that ``row="..."`` and ``about("...")`` name in the files of *folder*."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    return re.findall(r'(?:\brow=|\babout\()"([a-z0-9.-]+)"', text)


def sync() -> int:
    """Rewrite the ``tests`` lines; return how many chapters changed."""
    marks = marked_tests()
    changed = 0
    for name in CHAPTERS:
        path = Path(__file__).parent / f"{name}.toml"
        old = path.read_text(encoding="utf-8")
        new = re.sub(
            r'(?ms)^id = "(?P<id>[^"]+)"$(?P<body>(?:(?!^\[\[).)*?)^tests = \[.*?\]$',
            lambda m: f'id = "{m["id"]}"{m["body"]}tests = {_toml(marks.get(m["id"], []))}',
            old,
        )
        if new != old:
            path.write_text(new, encoding="utf-8")
            changed += 1
    return changed


def _toml(tests: list[str]) -> str:
    if not tests:
        return "[]"
    return "[\n" + "".join(f'  "{test}",\n' for test in tests) + "]"


if __name__ == "__main__":
    print(f"{sync()} chapters rewritten")
