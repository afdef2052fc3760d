# SPDX-License-Identifier: Apache-2.0
"""Named steps at which a test lets this process die.

``VBALLOON_KILL_AT=STEP:N`` makes the N-th passage of STEP raise SIGKILL, which is what the tests of
recovery need: a real death at a known place.  Of several plans, divided by commas, the first is
for the first worker, the second for the one after it.  Without the variable a step costs one
comparison.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

__all__ = ("advance", "arm", "step")

VARIABLE = "VBALLOON_KILL_AT"


class _Plan:
    def __init__(self, text: str) -> None:
        name, _, count = text.partition(":")
        self.name, self.count = name, int(count or 1)
        self.passed: Counter[str] = Counter()


_plan: _Plan | None = None
_later: list[str] = []


def arm(text: str) -> None:
    """Plan deaths as in ``VBALLOON_KILL_AT``; an empty text plans none."""
    global _plan
    first, *_later[:] = text.split(",")
    _plan = _Plan(first) if first else None


def advance() -> None:
    """Turn to the plan of the next worker, in the process that forks them."""
    arm(",".join(_later))


def step(name: str) -> None:
    """Pass the step *name*: kill this process if that is planned."""
    if _plan is None:
        return
    _plan.passed[name] += 1
    if _plan.name == name and _plan.passed[name] == _plan.count:
        os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get(VARIABLE, ""))
