# SPDX-License-Identifier: Apache-2.0
"""Search all states of the safety model with Spin: the contract holds, and needs each rule."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from vballoon_spec.safety import MODEL

README = MODEL.with_name("README.md")
SWITCHES = set(re.findall(r"^#ifn?def ([A-Z_]+)", MODEL.read_text(), re.MULTILINE))
SETTINGS = {"PAGES", "EVENTS", "NO_HINTS", "NO_WALKS", "NEVER"}
ASSUMPTIONS = {"SILENT_KEXEC", "DISCARDS"}
CLAIMS = {switch for switch in SWITCHES if switch.startswith("NEVER_")}
MUTATIONS = SWITCHES - SETTINGS - ASSUMPTIONS - CLAIMS


class Verdict(NamedTuple):
    """The result of a search."""

    errors: int
    states: int
    violated: str
    complete: bool


def search(folder: Path, *switches: str, model: Path = MODEL) -> Verdict:
    """Build the model with *switches* and search all of it (or up to the first error)."""

    def run(*command: str) -> str:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True, timeout=100
        ).stdout

    source = folder / model.name
    source.write_bytes(model.read_bytes())
    run("spin", "-a", *(f"-D{switch}" for switch in switches), source.name)
    run("gcc", "-O1", "-w", "-DSAFETY", "-o", "pan", "pan.c")
    words = run("./pan", "-m100000")
    counts = re.search(r"errors: (\d+)\s+(\d+) states, stored", words)
    assert counts, words
    violated = re.search(r"pan:1: (.*) \(at depth", words)
    return Verdict(
        int(counts[1]),
        int(counts[2]),
        violated[1] if violated else "",
        "max search depth too small" not in words and "Search not completed" not in words,
    )


def assert_page_lost(verdict: Verdict) -> None:
    assert verdict.errors == 1
    assert verdict.violated.startswith("assertion violated"), verdict
    assert "where" in verdict.violated  # the invariant failed, not a deadlock


def test_contract_holds(tmp_path: Path) -> None:
    verdict = search(tmp_path)
    assert verdict == (0, verdict.states, "", True)
    assert verdict.states > 100_000


def test_contract_holds_over_two_events(tmp_path: Path) -> None:
    assert search(tmp_path, "EVENTS=2")[::3] == (0, True)


@pytest.mark.parametrize("rule", sorted(MUTATIONS))
def test_each_rule_is_needed(rule: str, tmp_path: Path) -> None:
    assert_page_lost(search(tmp_path, rule))


@pytest.mark.parametrize("other", ["NO_HINTS", "NO_WALKS"])
@pytest.mark.parametrize(
    "rule", ["IGNORE_WRITES", "TRACK_AFTER_PUBLISHING", "STALE_ROUND", "IGNORE_GENERATION"]
)
def test_rules_of_rounds_are_needed_by_hints_and_walks_alone(
    rule: str, other: str, tmp_path: Path
) -> None:
    assert_page_lost(search(tmp_path, rule, other))


@pytest.mark.parametrize("claim", sorted(CLAIMS))
def test_every_provenance_leaves_pages_out(claim: str, tmp_path: Path) -> None:
    verdict = search(tmp_path, claim)
    assert verdict.errors == 1
    assert "left_out" in verdict.violated


def test_silent_kexec_needs_checks_of_holes(tmp_path: Path) -> None:
    assert_page_lost(search(tmp_path, "SILENT_KEXEC"))
    assert search(tmp_path, "SILENT_KEXEC", "DISCARDS")[::3] == (0, True)


def test_documentation_names_every_switch() -> None:
    named = set(re.findall(r"`([A-Z_]{6,})`", README.read_text()))
    assert named >= SWITCHES - SETTINGS
    assert named - {"MUST_TELL_HOST"} <= SWITCHES
    assert len(MUTATIONS) == 23
