# SPDX-License-Identifier: Apache-2.0
"""Named steps at which a test lets this process die.

``VBALLOON_KILL_AT=STEP:N`` makes the N-th passage of STEP raise SIGKILL, which is what the tests of
recovery need: a real death at a known place.  Without the variable a step costs one comparison.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

__all__ = ("arm", "step")

VARIABLE = "VBALLOON_KILL_AT"


class _Plan:
    def __init__(self, text: str) -> None:
        name, _, count = text.partition(":")
        self.name, self.count = name, int(count or 1)
        self.passed: Counter[str] = Counter()


_plan: _Plan | None = _Plan(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None


def arm(text: str) -> None:
    """Plan the death of this process at ``STEP:N``; an empty text plans none."""
    global _plan
    _plan = _Plan(text) if text else None


def step(name: str) -> None:
    """Pass the step *name*: kill this process if that is planned."""
    if _plan is None:
        return
    _plan.passed[name] += 1
    if _plan.name == name and _plan.passed[name] == _plan.count:
        os.kill(os.getpid(), signal.SIGKILL)
