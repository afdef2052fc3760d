# SPDX-License-Identifier: Apache-2.0
"""A bounded log of a connection: the first lines, the last lines, and a count between them."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence

__all__ = ("Transcript", "shortened")

_GAP = re.compile(r"\.\.\. (\d+) messages? left out \.\.\.")


class Transcript:
    """The first and last lines of an exchange."""

    def __init__(self, first: int = 8, last: int = 32) -> None:
        self._first = first
        self._head: list[str] = []
        self._tail: deque[str] = deque(maxlen=last)
        self._count = 0

    def add(self, line: str) -> None:
        """Add the line of one message."""
        self._count += 1
        if len(self._head) < self._first:
            self._head.append(line)
        else:
            self._tail.append(line)

    def lines(self) -> list[str]:
        """Return the lines that are kept, with a line that says how many messages are missing."""
        missing = self._count - len(self._head) - len(self._tail)
        return [*self._head, *_gap(missing), *self._tail]


def shortened(lines: Sequence[str], first: int, last: int) -> list[str]:
    """Return at most the *first* and *last* lines, and a count of all messages left out."""
    if len(lines) <= first + last + 1:
        return list(lines)
    middle = lines[first : len(lines) - last]
    return [*lines[:first], *_gap(sum(map(_messages, middle))), *lines[len(lines) - last :]]


def _gap(missing: int) -> list[str]:
    return [f"... {missing} message{'s' * (missing != 1)} left out ..."] if missing else []


def _messages(line: str) -> int:
    gap = _GAP.fullmatch(line)
    return int(gap[1]) if gap else 1
