# SPDX-License-Identifier: Apache-2.0
"""How much to measure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ("Options",)

TURNS = {"quick": 7, "short": 21, "full": 51}


@dataclass(frozen=True)
class Options:
    """*form*: ``quick`` (while developing), ``short`` (the usual one), ``full``."""

    form: str = "short"
    lab: bool = True
    """Whether virtual machines may be started."""

    @property
    def turns(self) -> int:
        """Turns of each contender, at most."""
        return TURNS[self.form]

    @property
    def full(self) -> bool:
        """Whether everything is wanted."""
        return self.form == "full"

    @property
    def quick(self) -> bool:
        """Whether a rough figure will do."""
        return self.form == "quick"
