# SPDX-License-Identifier: Apache-2.0
"""Checks of the page range records that a guest sends."""

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
"""Lowest page number or count that cannot be guest memory; sums of larger ones could wrap."""


def checked_ranges(
    layout: BitmapLayout, records: NDArray[Any], least: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], int]:
    """Return start and end of *records* (``WalkRange``) in guest memory, and the number of others.

    *least* is the size of the smallest requested block in pages, a power of two.  A range that does
    not consist of such blocks, each aligned to its size, breaks the order rule.
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
