# SPDX-License-Identifier: Apache-2.0
"""The list of seeded faults follows the code: each patch applies, and leaves valid Python."""

from __future__ import annotations

import ast
import shutil

import pytest
from tests.conformance.mutants import Mutant, mutants
from tests.roots import REPOSITORY

MUTANTS = mutants()


def patched(mutant: Mutant, folder) -> str:
    copy = folder / mutant.file
    copy.parent.mkdir(parents=True)
    shutil.copy(REPOSITORY / "device" / mutant.file, copy)
    mutant.apply(folder)
    return copy.read_text()


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.id for m in MUTANTS])
def test_every_mutant_applies_once(mutant, tmp_path):
    text = patched(mutant, tmp_path)
    ast.parse(text)
    assert text != (REPOSITORY / "device" / mutant.file).read_text()


def test_a_patch_that_does_not_apply_is_an_error(tmp_path):
    gone = Mutant("gone", "vballoon/errors.py", "", [{"old": "no such line", "new": ""}])
    with pytest.raises(ValueError, match="gone"):
        patched(gone, tmp_path)
