# SPDX-License-Identifier: Apache-2.0
"""The dirty-skip bitmap: which guest pages may be left out of a copy, and why.

A wrong set bit corrupts a guest silently; a missing one costs 4 KiB.  Therefore each
provenance has its own bitmap, a round records whether it ended complete, and a table says which
events void which bits.
"""

from __future__ import annotations

from vballoon.skipmap.bitmap import PageBitmap, combine
from vballoon.skipmap.export import FrozenExport, SkipExport, write_export
from vballoon.skipmap.layout import BitmapLayout, RegionBits
from vballoon.skipmap.map import SkipMap, SkipMapState
from vballoon.skipmap.rounds import (
    VOIDS,
    Instant,
    Provenance,
    Round,
    RoundKind,
    RoundState,
    VoidReason,
)

__all__ = (
    "VOIDS",
    "BitmapLayout",
    "FrozenExport",
    "Instant",
    "PageBitmap",
    "Provenance",
    "RegionBits",
    "Round",
    "RoundKind",
    "RoundState",
    "SkipExport",
    "SkipMap",
    "SkipMapState",
    "VoidReason",
    "combine",
    "write_export",
)
