# SPDX-License-Identifier: Apache-2.0
"""The words that this project does not use, searched in comments, docstrings, messages and pages.

CONTRIBUTING.md says how sentences are written here.  The list is short: it holds phrases that were
common once and that a reader has to stop at, each with a better one.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.roots import REPOSITORY

INSTEAD = {
    r"(?:go|goes|went|going) on\b": "continue",
    r"\btold\b|\btells\b": "say what is sent, reported or announced",
    r"\bbehind\b": "after; backing",
    r"\bput up\b": "create, register",
    r"\bseen to\b": "handled; filled in",
    r"\bmended\b": "fixed",
    r"\bstands?\b(?!-| alone| by| still)": "is",
    r"\bhas the word\b": "decides",
    r"\bof no use\b|\bworth nothing\b": "invalid, void, no longer watched",
    r"\bin (?:a|no) hurry\b": "latency matters; latency does not matter",
    r"\bfrom afar\b": "downsampled",
    r"\bmoods?\b": "load",
    r"\bdearest\b": "slowest, maximum",
    r"\bjudged as\b": "treated as",
    r"\bthe least and the most\b": "minimum to maximum",
    r"\bno machine has\b": "no real machine exceeds",
    r"\bleaves? the house\b": "is exported",
    r"\banybody\b|\beverybody\b": "name who it is",
    r"\bwhat is \w[\w ]*, is\b": "a sentence with a subject",
    r"(?<!memory )(?<![-\w./])[Bb]ackends?\b(?![-./\w(=]| <)": "back-end",
    r"(?<![-\w./])[Ff]rontends?\b(?![-./\w(=])": "front-end",
}
"""Regular expression to what is written instead."""

_PROGRAM = re.compile(r"^ *(?:import \w+$|from [\w.]+ import|def \w+\(|with .*:$)", re.M)
"""A line of a Python program, which some tests have in a string."""
TOPS = ("device", "docs", "driver_kmod", "examples", "spec", "tests")
KINDS = {".py", ".c", ".h", ".md", ".toml"}


def files() -> list[Path]:
    """Return every file whose sentences are checked."""
    found = [p for top in TOPS for p in (REPOSITORY / top).rglob("*") if p.suffix in KINDS]
    found += [p for p in REPOSITORY.glob("*") if p.suffix in KINDS]
    return sorted(p for p in found if p.name != Path(__file__).name)


def prose(text: str, suffix: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, sentence text) of the parts of *text* that are written for people."""
    if suffix == ".py":
        yield from _python(text)
    elif suffix in (".c", ".h"):
        for comment in re.finditer(r"/\*.*?\*/|//[^\n]*", text, re.S):
            yield text.count("\n", 0, comment.start()) + 1, comment[0]
    elif suffix == ".md":
        without = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.S | re.M)
        yield from enumerate(without.split("\n"), 1)
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if "#" in line:
                yield number, line[line.index("#") :]


def _python(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if " " in node.value and not _PROGRAM.search(node.value):
            yield node.lineno, node.value


def findings(text: str, suffix: str) -> list[str]:
    """Return one line for each phrase in *text* that is not used here."""
    found = []
    for number, part in prose(text, suffix):
        plain = re.sub(r"``?[^`]*``?|(?<!\*)\*\w+\*(?!\*)", "", part)
        for pattern, better in INSTEAD.items():
            for hit in re.finditer(pattern, plain):
                line = number + plain.count("\n", 0, hit.start())
                found.append(f"line {line}: {hit[0]!r}: write: {better}")
    return found


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_sentences_use_plain_words(path: Path) -> None:
    assert findings(path.read_text(), path.suffix) == []


@pytest.mark.parametrize(
    ("text", "suffix", "number"),
    [
        ("x = 1  # it goes on\n", ".py", 1),
        ('"""Return it.\n\nThe ring behind it.\n"""\n', ".py", 1),
        ('raise E(f"{x} was told so")\n', ".py", 1),
        ("/* the scalar engine\n * has the word */\n", ".c", 1),
        ("one\n\nThe backend is closed.\n", ".md", 1),
        ("x = 1 # what is over, is over\n", ".toml", 1),
        ("backend.close()  # ``backend`` and vhost_user/backend.py are names\n", ".py", 0),
        ('"""Stop *backend*, a parameter, not the **backend**."""\n', ".py", 1),
        ("```\n-object memory-backend-memfd goes on\n```\nA back-end.\n", ".md", 0),
    ],
)
def test_planted_phrases_are_found(text: str, suffix: str, number: int) -> None:
    assert len(findings(text, suffix)) == number
