# SPDX-License-Identifier: Apache-2.0
"""Known failures: a file of rows and tests, against which a run shows what is new and what is gone.

The file is JSON: ``{"baseline": 1, "known": [{"row": ..., "test": ...}, ...]}``.  Parameters of a
test are part of its name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtio_conformance.record import NOT_APPLICABLE, Run

__all__ = ("Baseline", "Difference", "failures")

FORMAT = 1
Failure = tuple[str, str]
"""A row, and the test that found it broken."""


@dataclass(frozen=True)
class Difference:
    """What separates a run from a baseline."""

    new: frozenset[Failure]
    known: frozenset[Failure]
    gone: frozenset[Failure]
    """Known failures whose tests ran to an end and found nothing."""


@dataclass(frozen=True)
class Baseline:
    """The failures that are known."""

    known: frozenset[Failure]

    @classmethod
    def load(cls, path: Path) -> Baseline:
        """Return the baseline in *path*; raise :class:`ValueError` with one line if it is none."""
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
            if data["baseline"] != FORMAT:
                raise ValueError
            return cls(frozenset((str(one["row"]), str(one["test"])) for one in data["known"]))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: no baseline of format {FORMAT}") from None

    def save(self, path: Path) -> None:
        """Write the file, sorted, so that a change of it can be reviewed."""
        known = [{"row": row, "test": test} for row, test in sorted(self.known)]
        text = json.dumps({"baseline": FORMAT, "known": known}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")

    def compare(self, run: Run) -> Difference:
        """Return what is new in *run*, what is as known, and what is gone."""
        found = failures(run)
        ran = {r.name for r in run.records if r.outcome in ("passed", "failed", NOT_APPLICABLE)}
        gone = {one for one in self.known - found if one[1] in ran}
        return Difference(frozenset(found - self.known), self.known & found, frozenset(gone))


def failures(run: Run) -> frozenset[Failure]:
    """Return the rows that *run* found broken, each with its test."""
    return frozenset((record.broken, record.name) for record in run.records if record.broken)
