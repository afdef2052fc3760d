# SPDX-License-Identifier: Apache-2.0
"""The requirement catalogue: what the standards demand of a device, row by row.

One TOML file for each chapter.  A row has an id, the label of the specification's block that it
comes from, its strength, a paraphrase, and either the conformance tests that check it or the reason
why no front-end can.  Where it comes from is one of

``at``
    the place of a statement with a requirement word (MUST, SHOULD, ...) in the block, from 1;
``quote``
    words of a sentence that describes behaviour without such a word, and, where the row does not
    follow from them at once, how they are read (``reading``);
``ours``
    the reason for a rule that no sentence states.  Its strength is OURS: breaking it breaks no
    standard.

Rows of the chapter on robustness have the strength ROBUST.  ``[[elsewhere]]`` entries account for
statements that do not bind a back-end.  An id is never given to another row: those of rows that are
gone are listed in ``retired.toml``.

``index.json`` is derived from the sources of the specifications by :mod:`.count`; together with it
:func:`gaps` shows whether the catalogue is complete.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = (
    "CHAPTERS",
    "VERSION",
    "Chapter",
    "Elsewhere",
    "Requirement",
    "by_id",
    "chapters",
    "gaps",
    "index",
    "retired",
    "revisions",
)

VERSION = "3"
"""Version of the catalogue; a row that is added, reworded or retired makes a new one."""

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
STRENGTHS = ("MUST", "MUST NOT", "SHOULD", "SHOULD NOT", "MAY", "OURS", "ROBUST")


@dataclass(frozen=True)
class Requirement:
    """One statement, as this project understands it."""

    id: str
    label: str
    strength: str
    text: str
    at: int = 0
    """Which statement of the block, from 1; 0 for a row with a quote or of our own."""
    quote: str = ""
    """Words of the sentence, where it has no requirement word."""
    reading: str = ""
    """How the row follows from the quoted words."""
    ours: str = ""
    """Why the rule is there although no sentence states it."""
    since: str = ""
    """The first version of the virtio standard that has the statement; empty: 1.2 or before."""
    tests: tuple[str, ...] = ()
    untestable: str = ""
    chapter: str = ""

    def in_version(self, version: str) -> bool:
        """Return whether the statement is in *version* (``1.2`` ...) of the virtio standard."""
        return self.since <= version

    @property
    def source(self) -> str:
        """What the row rests on, for people: its quote, its place, or its reason."""
        if self.ours:
            return f"a rule of this suite: {self.ours}"
        if self.quote:
            return f"\u201c{self.quote}\u201d" + (f" {self.reading}" if self.reading else "")
        return f"statement {self.at} of its block" if self.at else ""


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
    """Return the whole catalogue, in the order of :data:`CHAPTERS`."""
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
    """Return every row by its id; raise :class:`ValueError` for a duplicate or a retired id."""
    found: dict[str, Requirement] = {}
    for chapter in chapters():
        for row in chapter.rows:
            if row.id in found or row.id in retired():
                raise ValueError(f"requirement {row.id} is there twice, or is retired")
            found[row.id] = row
    return found


@cache
def retired() -> dict[str, str]:
    """Return the ids that were used once, and what became of their rows."""
    text = (files(__package__) / "retired.toml").read_text(encoding="utf-8")
    gone: dict[str, str] = tomllib.loads(text)["retired"]
    return gone


@cache
def index() -> dict[str, dict[str, dict[str, Any]]]:
    """Return chapter → label → ``{"strengths": [...], "sha256": ..., "line": ...}``."""
    text = (files(__package__) / "index.json").read_text(encoding="utf-8")
    loaded: dict[str, dict[str, dict[str, Any]]] = json.loads(text)["chapters"]
    return loaded


def revisions() -> dict[str, str]:
    """Return the pinned revision of each specification."""
    text = (files(__package__) / "index.json").read_text(encoding="utf-8")
    pinned: dict[str, str] = json.loads(text)["revisions"]
    return pinned


def gaps(chapter: Chapter) -> list[str]:
    """Return how a chapter differs from its sources: statements missing, counted twice, misread."""
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
