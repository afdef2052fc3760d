# SPDX-License-Identifier: Apache-2.0
"""The dirty-skip bitmap: which guest pages may be left out of a copy, and who said so.

A wrong set bit is silent corruption of somebody's guest; a missing one costs 4 KiB.  Hence a
bitmap for each provenance, rounds with an end and a verdict, and a table of what makes them void.
"""

from __future__ import annotations

from vballoon.skipmap.bitmap import PageBitmap, combine
from vballoon.skipmap.export import FrozenExport, SkipExport, write_export
from vballoon.skipmap.layout import BitmapLayout, RegionBits
from vballoon.skipmap.map import SkipMap
from vballoon.skipmap.rounds import VOIDS, Instant, Provenance, Round, RoundKind, VoidReason

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
    "SkipExport",
    "SkipMap",
    "VoidReason",
    "combine",
    "write_export",
)
