# SPDX-License-Identifier: Apache-2.0
"""Records of page ranges as a guest sends them, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vballoon.memory.pages import PAGE_SHIFT

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from vballoon.skipmap.layout import BitmapLayout

__all__ = ("checked_ranges",)

_PFN_LIMIT = np.uint64(1 << (64 - PAGE_SHIFT - 1))
"""Page numbers and counts from here on cannot be guest memory, and their sum could wrap."""


def checked_ranges(
    layout: BitmapLayout, records: NDArray[Any], least: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], int]:
    """Ranges of *records* (``WalkRange``) that lie in guest memory: start, end, how many do not.

    *least* is the smallest block that was asked for, a power of two; a range that is not made of
    such blocks, each at a multiple of its size, breaks the order rule.
    """
    pfn, num = records["pfn"], records["num"]
    fits = (num > 0) & (num < _PFN_LIMIT) & (pfn < _PFN_LIMIT)
    if least > 1:
        fits &= ((pfn | num) & np.uint64(least - 1)) == 0
    if not fits.all():
        pfn, num = pfn[fits], num[fits]
    end = pfn + num
    inside = layout.holds(pfn, end)
    if not inside.all():
        pfn, end = pfn[inside], end[inside]
    return pfn, end, records.size - pfn.size
