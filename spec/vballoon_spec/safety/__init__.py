# SPDX-License-Identifier: Apache-2.0
"""The safety contract of the skip bitmap as a model for spin; see ``README.md`` in this folder."""

from __future__ import annotations

from pathlib import Path

__all__ = ("MODEL", "MOVE_MODEL")

MODEL = Path(__file__).with_name("contract.pml")
"""The Promela source."""
MOVE_MODEL = Path(__file__).with_name("move.pml")
"""The Promela source of the model of a move."""
