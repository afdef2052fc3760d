# SPDX-License-Identifier: Apache-2.0
"""Logging to standard error: one line for each record, which names its machine."""

from __future__ import annotations

import logging
import sys

__all__ = ("set_up_logging",)


class _OneLine(logging.Formatter):
    """Format a record as one line: escape what a peer sent, and join tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\r", "\\r").replace("\n", " | ")


def set_up_logging(level: str, machine: str = "") -> None:
    """Log from *level* on: time, level, room, *machine*, message."""
    handler = logging.StreamHandler(sys.stderr)
    name = machine.replace("%", "%%") + ": " if machine else ""
    handler.setFormatter(_OneLine(f"%(asctime)s %(levelname)s %(name)s: {name}%(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
