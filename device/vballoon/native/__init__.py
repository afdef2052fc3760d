# SPDX-License-Identifier: Apache-2.0
"""The compiled inner loops: :data:`native` where they were built, None where they were not.

NumPy needs several passes, each with a call of its own, for what these loops do in one: following
descriptor chains, writing used elements, setting runs of bits, merging page numbers.  They are
optional: every user has a form in NumPy with the same meaning, takes it where :data:`native` is
None, and tests both.  ``VBALLOON_NATIVE=0`` in the environment turns the loops off.

Guest input is checked here as it is in NumPy, but never reported as a fault: whatever is not valid
beyond doubt is left to the scalar engine, which names the violated rule.  The loops get guest
memory as mappings (:attr:`GuestMemory.tables <vballoon.memory.table.GuestMemory.tables>`), export
the buffers of those that they access for the length of one call, and keep no address.
"""

from __future__ import annotations

import importlib
import os
from typing import cast

from vballoon.native.interface import BitmapLoops, MemoryLoops, Native, RingLoops, Tables

__all__ = ("BitmapLoops", "MemoryLoops", "Native", "RingLoops", "Tables", "native")


def _load() -> Native | None:
    if os.environ.get("VBALLOON_NATIVE") == "0":
        return None
    try:
        return cast("Native", importlib.import_module("vballoon.native._native"))
    except ImportError:
        return None


native: Native | None = _load()
"""The compiled functions, or None."""
