# SPDX-License-Identifier: Apache-2.0
"""docs/architecture.md against the sources: the rooms, their modules, and every signature."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from tests.roots import PACKAGES, REPOSITORY
from tests.unit.test_layering import ROOMS

PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M))
"""Room to the text of its section."""
PLACES = ("vballoon.memory", "vballoon.virtqueue.make")
"""Modules in which the page's classes and functions are looked up."""


def blocks() -> list[ast.stmt]:
    """Return the classes and functions that the page declares."""
    texts = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    return [node for text in texts for node in ast.parse(text).body]


def named(name: str) -> Any:
    """Return the object *name* of one of the modules that the page describes."""
    for place in PLACES:
        found = getattr(importlib.import_module(place), name, None)
        if found is not None:
            return found
    raise AssertionError(f"the page declares {name}, which does not exist")


def faults(declared: ast.stmt, real: Any) -> list[str]:
    """Return how the declaration of a function or class differs from the real one."""
    if isinstance(declared, ast.ClassDef):
        return [fault for node in declared.body for fault in _member(node, declared.name, real)]
    assert isinstance(declared, ast.FunctionDef)
    return _parameters(declared, declared.name, real)


def _member(node: ast.stmt, owner: str, real: Any) -> list[str]:
    if isinstance(node, ast.AnnAssign):
        assert isinstance(node.target, ast.Name)
        source = inspect.getsource(real)
        known = re.search(rf"\bself\.{node.target.id}\b", source) or hasattr(real, node.target.id)
        return [] if known else [f"{owner}.{node.target.id} does not exist"]
    assert isinstance(node, ast.FunctionDef)
    place = f"{owner}.{node.name}"
    if not hasattr(real, node.name):
        return [f"{place} does not exist"]
    if any(ast.unparse(decorator) == "property" for decorator in node.decorator_list):
        is_property = isinstance(inspect.getattr_static(real, node.name), property)
        return [] if is_property else [f"{place} is no property"]
    return _parameters(node, place, getattr(real, node.name))


def _parameters(node: ast.FunctionDef, place: str, real: Any) -> list[str]:
    said = [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)]
    there = list(inspect.signature(real).parameters)
    if said[:1] == ["cls"]:
        said = said[1:]
    return [] if said == there else [f"{place} has the parameters {there}, the page says {said}"]


def test_the_rooms_are_those_of_the_layering_test() -> None:
    (line,) = re.findall(r"^`errors` → .*$", PAGE, re.M)
    assert tuple(re.findall(r"`(\w+)`", line)) == ROOMS
    device = REPOSITORY / "device/vballoon"
    assert SECTIONS.keys() == {room for room in ROOMS if (device / room).is_dir()}


@pytest.mark.parametrize("declared", blocks(), ids=lambda node: node.name)
def test_signatures_are_those_of_the_code(declared: ast.stmt) -> None:
    assert isinstance(declared, (ast.ClassDef, ast.FunctionDef))
    assert faults(declared, named(declared.name)) == []


@pytest.mark.parametrize("room", SECTIONS)
def test_names_in_a_section_occur_in_its_room(room: str) -> None:
    """Find each name in back quotes as a word of the room's files, or of their names."""
    folder = REPOSITORY / "device/vballoon" / room
    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".c", ".json")]
    words = {path.stem for path in files} | set(PACKAGES)
    words |= {word for path in files for word in re.findall(r"[\w-]+", path.read_text())}
    prose = re.sub(r"```.*?```", "", SECTIONS[room], flags=re.S)
    missing = []
    for name in re.findall(r"`([^`]+)`", prose):
        if "/" in name or "*" in name or not re.fullmatch(r"[\w.-]+", name):
            continue  # a path, a pattern or an expression
        if Path(name).stem not in words and name.rpartition(".")[2] not in words:
            missing.append(name)
    assert missing == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("class Discarder:\n    def discard(self, memory): ...", "has the parameters"),
        ("class Discarder:\n    def give_back(self): ...", "give_back does not exist"),
        ("class GuestMemory:\n    holes: int", "holes does not exist"),
        ("class GuestMemory:\n    @property\n    def close(self): ...", "is no property"),
        ("def file_extents(fd): ...", "has the parameters"),
    ],
)
def test_a_planted_fault_is_found(text: str, fault: str) -> None:
    (declared,) = ast.parse(text).body
    assert isinstance(declared, (ast.ClassDef, ast.FunctionDef))
    assert fault in " ".join(faults(declared, named(declared.name)))
