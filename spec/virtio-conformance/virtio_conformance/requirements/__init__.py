# SPDX-License-Identifier: Apache-2.0
"""The requirement catalogue: what the standards demand of a device, row by row.

One TOML file per chapter.  A row has a stable id, the label of the specification's block it comes
from, the place of its statement in that block (``at``, counted from 1; rows without one put down
what the block's running text demands), its strength, a paraphrase, and either the conformance
tests that check it or the reason why no front-end can.  ``[[elsewhere]]`` entries account for
statements that do not bind a backend.

``index.json`` is derived from the specifications' sources by :mod:`.count`; together with it the
catalogue can be shown to be complete (:func:`gaps`).
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = ("CHAPTERS", "Chapter", "Elsewhere", "Requirement", "by_id", "chapters", "gaps", "index")

CHAPTERS = (
    "virtio_basic",
    "virtio_split",
    "virtio_packed",
    "virtio_pci",
    "virtio_balloon",
    "vhost_user",
    "vfio_user",
    "robustness",
)
STRENGTHS = ("MUST", "MUST NOT", "SHOULD", "SHOULD NOT", "MAY")


@dataclass(frozen=True)
class Requirement:
    """One statement, as this project understands it."""

    id: str
    label: str
    strength: str
    text: str
    at: int = 0
    """Which statement of the block, from 1; 0 for one that the running text makes."""
    tests: tuple[str, ...] = ()
    untestable: str = ""
    chapter: str = ""


@dataclass(frozen=True)
class Elsewhere:
    """A statement of the sources that does not bind a backend."""

    label: str
    at: int
    reason: str


@dataclass(frozen=True)
class Chapter:
    """One file of the catalogue."""

    name: str
    title: str
    specification: str
    rows: tuple[Requirement, ...]
    elsewhere: tuple[Elsewhere, ...]


@cache
def chapters() -> tuple[Chapter, ...]:
    """The whole catalogue, in the order of :data:`CHAPTERS`."""
    return tuple(_load(name) for name in CHAPTERS)


def _load(name: str) -> Chapter:
    data = tomllib.loads((files(__package__) / f"{name}.toml").read_text(encoding="utf-8"))
    rows = tuple(
        Requirement(**{**row, "tests": tuple(row.get("tests", ())), "chapter": name})
        for row in data["row"]
    )
    elsewhere = tuple(Elsewhere(**entry) for entry in data.get("elsewhere", ()))
    return Chapter(name, data["title"], data["specification"], rows, elsewhere)


@cache
def by_id() -> dict[str, Requirement]:
    """Every row by its id; a duplicate raises :class:`ValueError`."""
    found: dict[str, Requirement] = {}
    for chapter in chapters():
        for row in chapter.rows:
            if row.id in found:
                raise ValueError(f"requirement {row.id} twice")
            found[row.id] = row
    return found


@cache
def index() -> dict[str, dict[str, dict[str, Any]]]:
    """Chapter → label → ``{"strengths": [...], "sha256": ..., "line": ...}``, from the sources."""
    text = (files(__package__) / "index.json").read_text(encoding="utf-8")
    loaded: dict[str, dict[str, dict[str, Any]]] = json.loads(text)["chapters"]
    return loaded


def revisions() -> dict[str, str]:
    """The pinned revision of each specification."""
    text = (files(__package__) / "index.json").read_text(encoding="utf-8")
    pinned: dict[str, str] = json.loads(text)["revisions"]
    return pinned


def gaps(chapter: Chapter) -> list[str]:
    """What separates a chapter from its sources: statements missing, counted twice or misjudged."""
    expected = {
        (label, at): strength
        for label, block in index().get(chapter.name, {}).items()
        for at, strength in enumerate(block["strengths"], 1)
    }
    faults: list[str] = []
    seen: set[tuple[str, int]] = set()
    entries: list[Requirement | Elsewhere] = [*chapter.rows, *chapter.elsewhere]
    for entry in entries:
        if not entry.at:
            continue
        place = (entry.label, entry.at)
        if place in seen:
            faults.append(f"{entry.label} #{entry.at}: accounted for twice")
        seen.add(place)
        if place not in expected:
            faults.append(f"{entry.label} #{entry.at}: no such statement in the sources")
        elif isinstance(entry, Requirement) and entry.strength != expected[place]:
            faults.append(f"{entry.id}: {entry.strength} here, {expected[place]} in the sources")
    faults += [f"{label} #{at}: missing" for label, at in expected if (label, at) not in seen]
    return faults
