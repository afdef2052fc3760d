# SPDX-License-Identifier: Apache-2.0
"""The device side of virtqueues: take a batch of descriptor chains, give a batch back.

Split and packed rings each have two engines with the same results.  The scalar engine is simple and
reaches any memory.  The batch engine handles a thousand buffers with a dozen array operations.
Each violation by a driver has a named rule (:mod:`vballoon.virtqueue.rules`).
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
