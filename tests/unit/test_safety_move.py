# SPDX-License-Identifier: Apache-2.0
"""Spin searches all states of the model of a move: never two, never lost, and each rule counts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.unit.test_safety_model import search

from vballoon_spec.safety import MOVE_MODEL

README = MOVE_MODEL.with_name("move.md")
SWITCHES = set(re.findall(r"\b(?:ifn?def |defined\()([A-Z_]+)", MOVE_MODEL.read_text()))
CLAIMS = {switch for switch in SWITCHES if switch.startswith("NEVER_")}
RULES = SWITCHES - CLAIMS


def test_protocol_holds(tmp_path: Path) -> None:
    verdict = search(tmp_path, model=MOVE_MODEL)
    assert verdict == (0, verdict.states, "", True)
    assert verdict.states > 10_000


@pytest.mark.parametrize("rule", sorted(RULES))
def test_each_rule_is_needed(rule: str, tmp_path: Path) -> None:
    verdict = search(tmp_path, rule, model=MOVE_MODEL)
    assert verdict.errors == 1
    assert verdict.violated.startswith("assertion violated"), verdict


@pytest.mark.parametrize("claim", sorted(CLAIMS))
def test_every_end_is_reached(claim: str, tmp_path: Path) -> None:
    assert search(tmp_path, claim, model=MOVE_MODEL).errors == 1


def test_documentation_names_every_switch() -> None:
    assert set(re.findall(r"`([A-Z_]{7,})`", README.read_text())) == SWITCHES
    assert len(RULES) == 14
