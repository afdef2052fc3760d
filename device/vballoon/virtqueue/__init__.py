# SPDX-License-Identifier: Apache-2.0
"""Virtqueues, device side: take a batch of descriptor chains, give a batch back.

Split and packed rings, each with two engines that mean the same: a scalar one that is obviously
right and reaches any memory, and a batch one that handles a thousand buffers with a dozen array
operations.  What a driver breaks is named by a rule (:mod:`vballoon.virtqueue.rules`).
"""

from __future__ import annotations

from vballoon.virtqueue.base import (
    ChainBatch,
    Engine,
    RingAddresses,
    RingState,
    Virtqueue,
    empty_batch,
)
from vballoon.virtqueue.inflight import InflightLog, NullInflight, Resubmit
from vballoon.virtqueue.make import make_virtqueue
from vballoon.virtqueue.rules import RULES

__all__ = (
    "RULES",
    "ChainBatch",
    "Engine",
    "InflightLog",
    "NullInflight",
    "Resubmit",
    "RingAddresses",
    "RingState",
    "Virtqueue",
    "empty_batch",
    "make_virtqueue",
)
