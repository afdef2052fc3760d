# SPDX-License-Identifier: Apache-2.0
"""Extents of a file of guest memory: where it holds data, and where its guest pages are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vballoon.memory import ByteRanges, file_extents

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vballoon.memory import PageRanges

__all__ = ("data_extents", "to_file")


def data_extents(fd: int, size: int) -> ByteRanges:
    """Return where the first *size* bytes of the file hold data.

    On a file system that does not report holes, everything is data.
    """
    return file_extents(fd, 0, size)


def to_file(pages: PageRanges, regions: Iterable[tuple[int, int, int]]) -> ByteRanges:
    """Return *pages* of guest memory as bytes of the file that *regions* are in.

    *regions* are (guest-physical address, size, offset in the file), bytes.  Pages outside all
    regions are dropped.
    """
    addresses, found = pages.bytes(), ByteRanges()
    for addr, size, offset in regions:
        found |= addresses.clip(addr, addr + size).moved(offset - addr)
    return found
