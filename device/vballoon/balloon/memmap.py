# SPDX-License-Identifier: Apache-2.0
"""Collect where the guest keeps its page structures, from the MEMMAP buffers of its module.

The device only collects the layout; reading guest memory by it is the business of whoever stops
the guest first (the snapshot room).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vballoon_spec.walk.formats import WalkHeader, WalkMemmap, WalkMemmapRun

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

__all__ = ("MemmapCollector", "MemmapLayout")

RUNS_MAX = 1 << 20
"""Runs kept of one layout (40 MiB).  A run covers 2 MiB of page structures, so 128 MiB of guest,
at worst: this is a guest of 128 TiB."""

BUFFERS_MAX = 1 << 14
"""Buffers of one layout.  Full buffers for :data:`RUNS_MAX` runs are fewer than 1400."""


@dataclass(frozen=True, slots=True)
class MemmapLayout:
    """A complete layout: the constants, and the runs as an array of :class:`WalkMemmapRun`."""

    header: WalkMemmap
    runs: NDArray[Any]
    partial: bool


class MemmapCollector:
    """Puts the buffers of a set together; a whole set replaces the one before [WALK-D13]."""

    def __init__(self) -> None:
        self.layout: MemmapLayout | None = None
        self._header: WalkMemmap | None = None
        self._parts: list[NDArray[Any]] = []
        self._have = 0  # runs in the parts
        self._flags = 0

    def reset(self) -> None:
        """Forget the layout: it belonged to another boot."""
        self.layout = self._header = None
        self._parts = []

    def add(self, header: WalkHeader, payload: bytes) -> bool:
        """Take one MEMMAP buffer (*payload* without its header); False when it does not fit."""
        body = WalkMemmap.parse(payload[: WalkMemmap.SIZE])
        runs = np.frombuffer(payload, dtype=WalkMemmapRun.dtype(), offset=WalkMemmap.SIZE)
        if header.seq == 0:
            self._header, self._parts, self._have, self._flags = body, [], 0, 0
        if self._header != body or header.seq != len(self._parts) or not self._fits(body, runs):
            self._header, self._parts = None, []
            return False
        self._parts.append(runs)
        self._have += runs.size
        self._flags |= header.flags
        if len(self._parts) == body.nr_buffers:
            self._complete(body)
        return True

    def _fits(self, body: WalkMemmap, runs: NDArray[Any]) -> bool:
        if body.nr_buffers > BUFFERS_MAX or (not runs.size and body.nr_buffers != 1):
            return False  # the set would grow by buffers, however few runs it has
        have = self._have + runs.size
        more_due = len(self._parts) + 1 < body.nr_buffers
        return have <= min(body.nr_runs, RUNS_MAX) and (more_due or have == body.nr_runs)

    def _complete(self, body: WalkMemmap) -> None:
        self.layout = MemmapLayout(
            header=body, runs=np.concatenate(self._parts), partial=bool(self._flags & 1)
        )
        self._header, self._parts = None, []
