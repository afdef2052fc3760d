# SPDX-License-Identifier: Apache-2.0
"""What the suite has to say about a backend.

::

    Finding             the backend did something that it must not (fails the test)
      Hang              ... or did nothing within the time limit
      Closed            the backend ended the connection (a test may expect that)
    NotApplicable       the test does not concern this backend; says why
"""

from __future__ import annotations

from typing import NoReturn

import pytest

__all__ = ("Closed", "Finding", "Hang", "not_applicable", "require")


class Finding(AssertionError):
    """A rule was broken; the text says what was observed."""


class Hang(Finding):
    """Nothing came within the time limit."""


class Closed(Finding):
    """The backend closed the connection where none was to be closed."""


def require(condition: object, observed: str) -> None:
    """Raise :class:`Finding` with *observed* unless *condition* holds."""
    if not condition:
        raise Finding(observed)


def not_applicable(reason: str) -> NoReturn:
    """End the test: its rule does not concern this backend, because of *reason*."""
    pytest.skip(f"n/a: {reason}")
