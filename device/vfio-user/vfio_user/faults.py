# SPDX-License-Identifier: Apache-2.0
"""Report what a device's own callbacks raise.

The author of the device needs the traceback; a guest that can provoke the fault again and again
must not be able to fill the log.  So each place is reported in full once.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable

__all__ = ("guarded", "report_fault")

log = logging.getLogger(__name__)

_REPORTED_MAX = 256
_reported: set[tuple[str, str, int | None]] = set()


def report_fault(what: str, error: BaseException) -> None:
    """Log *error*, raised while *what* was done: with its traceback the first time."""
    frames = traceback.extract_tb(error.__traceback__)
    place = (type(error).__name__, frames[-1].filename, frames[-1].lineno) if frames else None
    first = place is not None and place not in _reported and len(_reported) < _REPORTED_MAX
    if place is not None and first:
        _reported.add(place)
    text = f"{what}: {type(error).__name__}: {error}"
    log.log(logging.ERROR if first else logging.DEBUG, text, exc_info=error if first else None)


def guarded(what: str, step: Callable[[], object]) -> None:
    """Call *step*; report what it raises, so that the steps after it are still taken."""
    try:
        step()
    except Exception as error:
        report_fault(what, error)
