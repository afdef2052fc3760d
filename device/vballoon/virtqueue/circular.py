# SPDX-License-Identifier: Apache-2.0
"""Copies and assignments of runs in a circular array, which may wrap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("load_run", "store_run")


def load_run(ring: NDArray[Any], start: int, count: int) -> NDArray[Any]:
    """Return a private copy of *count* entries of *ring* from *start* on (0 <= start < len)."""
    over = start + count - ring.shape[0]
    if over <= 0:
        return ring[start : start + count].copy()
    return np.concatenate((ring[start:], ring[:over]))


def store_run(ring: NDArray[Any], start: int, values: NDArray[Any]) -> None:
    """Store *values*, at most len, in *ring* from *start* on (0 <= start < len)."""
    fits = ring.shape[0] - start
    if values.shape[0] <= fits:
        ring[start : start + values.shape[0]] = values
    else:
        ring[start:] = values[:fits]
        ring[: values.shape[0] - fits] = values[fits:]
