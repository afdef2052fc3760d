# SPDX-License-Identifier: Apache-2.0
"""The balloon's target: the guest's memory that the operator asked for, in bytes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vballoon.control.client import ControlClient
from vballoon.errors import UsageError

if TYPE_CHECKING:
    import os

__all__ = ("set_target",)

READY_SECONDS = 30.0
"""How long the guest's driver may take to start before the target can be set."""
POLL_SECONDS = 0.02


def set_target(path: str | os.PathLike[str], target: int) -> None:
    """Set *target* at the control socket *path* as soon as the back-end has the guest's memory.

    Raise UsageError if it has not within READY_SECONDS.
    """
    deadline = time.monotonic() + READY_SECONDS
    with ControlClient(path) as control:
        while not control.execute("query-status")["guest-size"]:
            if time.monotonic() > deadline:
                raise UsageError(f"the guest's driver has not started within {READY_SECONDS:g} s")
            time.sleep(POLL_SECONDS)
        control.execute("balloon", {"value": target, "force": True})
