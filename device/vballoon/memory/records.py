# SPDX-License-Identifier: Apache-2.0
"""Many tables of 16-byte records, read from guest memory in one go (indirect descriptors)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vballoon.memory.table import GuestMemory

__all__ = ("RECORD", "reachable", "read_records")

RECORD = 16
"""Bytes of a record."""

_RECORD = np.dtype("V16")  # opaque and without alignment, so that NumPy never copies the memory


def reachable(
    memory: GuestMemory, addr: NDArray[np.uint64], length: NDArray[np.uint64]
) -> NDArray[np.bool_]:
    """Which ranges (uint64[n], bytes) :func:`read_records` can read: those in one mapped region."""
    good = np.zeros(addr.shape, np.bool_)
    for region in memory.regions:
        if region.view is not None:
            offset = addr - np.uint64(region.guest_phys_addr)
            size = np.uint64(region.size)
            good |= (offset <= size) & (length <= size - offset)
    return good


def read_records(
    memory: GuestMemory, addr: NDArray[np.uint64], count: NDArray[np.intp]
) -> NDArray[np.uint64]:
    """Return the *count* records at each *addr*, joined (uint64[sum, 2]); read each byte once.

    Every table must be :func:`reachable`; any alignment will do.
    """
    total = int(count.sum())
    rows = np.empty(total, _RECORD)
    first = np.cumsum(count) - count
    index = np.arange(total) - np.repeat(first, count)
    for region in memory.regions:
        offset = addr - np.uint64(region.guest_phys_addr)
        mine = offset < np.uint64(region.size)
        if region.view is None or not mine.any():
            continue
        if mine.all():
            rows = _from_region(region.view, offset.astype(np.intp), count, index)
            break
        wanted = np.repeat(mine, count)
        rows[wanted] = _from_region(
            region.view, offset[mine].astype(np.intp), count[mine], index[wanted]
        )
    return rows.view(np.uint64).reshape(total, 2)


def _from_region(
    view: NDArray[np.uint8],
    offset: NDArray[np.intp],
    count: NDArray[np.intp],
    index: NDArray[np.intp],
) -> NDArray[np.void]:
    if offset.size == 1:
        start = int(offset[0])
        return view[start : start + RECORD * int(count[0])].copy().view(_RECORD)
    if not (offset & (RECORD - 1)).any():
        whole = view[: view.size & -RECORD].view(_RECORD)
        return whole.take(np.repeat(offset // RECORD, count) + index)
    at = np.repeat(offset, count) + RECORD * index
    return view.take(at[:, np.newaxis] + np.arange(RECORD)).view(_RECORD).reshape(-1)
