# SPDX-License-Identifier: Apache-2.0
"""Findings about a back-end, and the row of the catalogue that each of them is about.

::

    Finding             the back-end did something that a row forbids (fails the test)
      Hang              ... or did nothing within the time limit
      Closed            the back-end ended the connection (a test may expect that)
      Crash             the back-end ended by a signal, or its output has a panic or a traceback
    NotStarted          there is no back-end to test: the whole run ends
    NotApplicable       the test does not concern this back-end; it says why

A finding is about one row.  In order of precedence the row is the one that :func:`require` names,
the one of the innermost :func:`about` around it, or the first row that the test is marked with.
What is raised within :func:`preparing` and names no row accuses nobody: the test is inconclusive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NoReturn

import pytest

__all__ = (
    "Closed",
    "Crash",
    "Finding",
    "Hang",
    "NotStarted",
    "about",
    "not_applicable",
    "preparing",
    "require",
)


class Finding(AssertionError):
    """A rule was broken; the text says what was observed."""

    def __init__(self, observed: str = "", *, row: str = "") -> None:
        super().__init__(observed)
        self.row = row
        """The row that is broken; empty where the test's first row is meant."""
        self.inconclusive = False
        """Whether it happened before anything was tested."""


class Hang(Finding):
    """Nothing came within the time limit."""


class Closed(Finding):
    """The back-end closed the connection where none was to be closed."""


class Crash(Finding):
    """The back-end crashed, or printed a panic or a traceback."""


class NotStarted(Exception):
    """The back-end cannot be tested at all; the text is one line that says why."""


def require(condition: object, observed: str, *, row: str = "") -> None:
    """Raise :class:`Finding` with *observed*, about *row*, unless *condition* holds."""
    if not condition:
        raise Finding(observed, row=row)


@contextlib.contextmanager
def about(row: str) -> Iterator[None]:
    """Attribute findings raised within to *row*, unless they name a row themselves."""
    try:
        yield
    except Finding as finding:
        if not finding.row:
            finding.row, finding.inconclusive = row, False
        raise


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """Mark findings raised within as inconclusive, unless they name a row."""
    try:
        yield
    except Finding as finding:
        finding.inconclusive = finding.inconclusive or not finding.row
        raise


def not_applicable(reason: str) -> NoReturn:
    """End the test: its rule does not concern this back-end, because of *reason*."""
    pytest.skip(f"n/a: {reason}")
