# SPDX-License-Identifier: Apache-2.0
"""Extents of a file of guest memory: its data, minus what may be left out."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    I64 = NDArray[np.int64]

__all__ = ("common", "data_extents", "length", "to_file", "without")

PAGE_SHIFT = 12


def data_extents(fd: int, size: int) -> I64:
    """Return where the first *size* bytes hold data: int64[k, 2], bytes, half open, ascending.

    On a file system that does not report holes, everything is data.
    """
    try:
        found = list(_extents(fd, size))
    except OSError:
        found = [(0, size)]
    return np.array(found, np.int64).reshape(-1, 2)


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    at = 0
    while at < size:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if data >= size:
            return
        at = min(os.lseek(fd, data, os.SEEK_HOLE), size)
        yield data, at


def length(extents: I64) -> int:
    """Return the number of bytes in *extents*."""
    return int((extents[:, 1] - extents[:, 0]).sum())


def to_file(ranges: NDArray[np.uint64], regions: list[tuple[int, int, int]]) -> I64:
    """Return page ranges of guest memory as extents of the file that *regions* are in.

    *ranges*: uint64[k, 2] in pages, disjoint; *regions*: (guest-physical address, size, offset in
    the file), bytes.  Pages outside all regions are dropped; the result is sorted and merged.
    """
    bounds = (ranges << np.uint64(PAGE_SHIFT)).astype(np.int64)
    found = [np.empty((0, 2), np.int64)]
    for addr, size, offset in regions:
        clipped = np.clip(bounds, addr, addr + size)
        found.append(clipped[clipped[:, 0] < clipped[:, 1]] + (offset - addr))
    return _merged(np.concatenate(found))


def _merged(extents: I64) -> I64:
    extents = extents[np.argsort(extents[:, 0], kind="stable")]
    if len(extents) < 2:
        return extents
    reach = np.maximum.accumulate(extents[:, 1])
    first = np.append(True, extents[1:, 0] > reach[:-1])
    last = np.append(first[1:], True)
    return np.column_stack((extents[first, 0], reach[last]))


def without(extents: I64, left_out: I64) -> I64:
    """Return *extents* minus *left_out*. Each must be sorted and disjoint."""
    # Sweep over all borders and count: +1 inside an extent, -1 inside what is left out.
    borders = np.concatenate((extents[:, 0], extents[:, 1], left_out[:, 0], left_out[:, 1]))
    steps = np.repeat(
        np.array([1, -1, -1, 1]),
        [len(extents), len(extents), len(left_out), len(left_out)],
    )
    order = np.argsort(borders, kind="stable")
    borders, level = borders[order], np.cumsum(steps[order])
    inside = np.flatnonzero(level[:-1] == 1) if borders.size else np.empty(0, np.intp)
    pieces = np.column_stack((borders[inside], borders[inside + 1]))
    return _merged(pieces[pieces[:, 0] < pieces[:, 1]])


def common(left: I64, right: I64) -> I64:
    """Return the intersection. Each must be sorted and disjoint."""
    return without(left, without(left, right))
