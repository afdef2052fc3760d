# SPDX-License-Identifier: Apache-2.0
"""Giving guest memory back to the host: the only place that frees any.

Pages are freed by punching holes in the backing file (``fallocate``); ``MADV_DONTNEED`` on shared
memory succeeds and frees nothing.  A punch never leaves the region's own range of its file, so
nothing of a neighbour in the same file can be lost.

On hugetlbfs only whole huge pages can be freed.  Where the guest gives 4 KiB pages piece by piece
(a balloon), pieces are remembered until a huge page is complete, and :meth:`Discarder.undo`
forgets the pages that the guest takes back.  That is only safe where the guest asks before it
uses a page again; for pages that it may take back silently (reported ones), pieces must not be
remembered, and are left alone.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

import numpy as np

from vballoon.memory.pages import clip, coalesce, expand, inward
from vballoon.memory.regions import PAGE_SIZE
from vballoon.native import native

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vballoon.memory.regions import MemoryRegion
    from vballoon.memory.table import GuestMemory

    U64 = NDArray[np.uint64]

__all__ = ("Discarder",)

log = logging.getLogger(__name__)

_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02  # FALLOC_FL_*, <linux/falloc.h>

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_fallocate.restype = ctypes.c_int


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free *length* bytes of the file behind *fd* from *offset* on; raises :class:`OSError`."""
    while _fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def punch_holes(fd: int, first: U64, last: U64) -> tuple[int, int]:
    """Free [*first*, *last*) (bytes) of the file behind *fd* until one range cannot be freed.

    Returns how many were, and the error number (0: none).
    """
    if native is not None:
        return native.punch(fd, np.ascontiguousarray(first), np.ascontiguousarray(last))
    for done, (begin, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        try:
            punch_hole(fd, begin, end - begin)
        except OSError as error:
            return done, error.errno or errno.EIO
    return first.size, 0


class Discarder:
    """Frees guest pages.  With *enabled* off (``--no-discard``) nothing is ever freed.

    ``refused`` counts regions whose file cannot be punched (read-only, sealed, or a file system
    without holes); each is reported once, in the log.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.refused = 0
        self._unpunchable: WeakSet[MemoryRegion] = WeakSet()
        self._given: WeakKeyDictionary[MemoryRegion, NDArray[np.bool_]] = WeakKeyDictionary()

    def discard(
        self, memory: GuestMemory, start: U64, end: U64, *, accumulate: bool = False
    ) -> int:
        """Free the guest-physical ranges [*start*, *end*) (uint64[n], bytes); returns bytes freed.

        Ranges may be in any order and overlap; what is not guest memory, or not a whole page of
        the backing file, is left alone.  With *accumulate*, parts of huge pages count until
        :meth:`undo` takes them back, and a huge page goes when its last part does; only for pages
        that the guest does not touch before they are undone.
        """
        if not self.enabled:
            return 0
        start, end = coalesce(start, end)
        freed = 0
        for region in memory.regions:
            if region.fd is None or region in self._unpunchable:
                continue
            if accumulate and region.page_size > PAGE_SIZE:
                first, last = _in_file(region, *_inside(region, start, end))
                first, last = self._completed(region, first, last)
                size = int((last - first).sum())
            else:
                first, last, size = _units_in_file(region, start, end)
            freed += self._punch(region, first, last, size)
        return freed

    def undo(self, memory: GuestMemory, start: U64, end: U64) -> None:
        """The guest uses these pages again: their huge pages are not complete any more."""
        if not self._given:
            return
        start, end = coalesce(start, end)
        for region in memory.regions:
            given = self._given.get(region)
            if given is not None:
                first, last = _in_file(
                    region, *clip(start, end, region.guest_phys_addr, region.end)
                )
                given[self._pieces(region, *_outward(first, last))] = False

    def forget(self) -> None:
        """Every page may be in use again (device reset): drop what was remembered of huge pages."""
        self._given.clear()

    def _completed(self, region: MemoryRegion, first: U64, last: U64) -> tuple[U64, U64]:
        """The huge pages touched by the ranges of which now every part has been given."""
        per_page = region.page_size // PAGE_SIZE
        given = self._given.get(region)
        if given is None:
            end = region.file_offset + region.size
            pages = -(-end // region.page_size) - region.file_offset // region.page_size
            given = self._given[region] = np.zeros(pages * per_page, np.bool_)
        pieces = self._pieces(region, *inward(first, last, PAGE_SIZE))
        given[pieces] = True
        touched = pieces // per_page
        touched = touched[np.concatenate(([True], touched[1:] != touched[:-1]))[: touched.size]]
        whole = touched[given.reshape(-1, per_page)[touched].all(axis=1)]
        page = np.uint64(region.page_size)
        begin = (whole.astype(np.uint64) + np.uint64(region.file_offset // region.page_size)) * page
        return coalesce(begin, begin + page)

    @staticmethod
    def _pieces(region: MemoryRegion, first: U64, last: U64) -> NDArray[np.intp]:
        """4 KiB pages of the file, counted from the region's first huge page (sorted)."""
        base = region.file_offset // region.page_size * (region.page_size // PAGE_SIZE)
        unit = np.uint64(PAGE_SIZE)
        return expand(first // unit, last // unit).astype(np.intp) - base

    def _punch(self, region: MemoryRegion, first: U64, last: U64, size: int) -> int:
        """Free ranges of *size* bytes in all; how many bytes were freed."""
        assert region.fd is not None
        if not first.size:
            return 0
        if region.view is not None and not region.view.flags.writeable:
            done, error = 0, errno.EROFS  # the guest must not change it by way of us either
        else:
            done, error = punch_holes(region.fd, first, last)
        if not error:
            return size
        self._unpunchable.add(region)
        self.refused += 1
        log.warning(
            "memory at %#x cannot be given back: %s", region.guest_phys_addr, os.strerror(error)
        )
        return int((last[:done] - first[:done]).sum())


def _inside(region: MemoryRegion, start: U64, end: U64) -> tuple[U64, U64]:
    """What of merged ranges is in *region*; usually all."""
    if start.size and start[0] >= region.guest_phys_addr and end[-1] <= region.end:
        return start, end
    return clip(start, end, region.guest_phys_addr, region.end)


def _units_in_file(region: MemoryRegion, start: U64, end: U64) -> tuple[U64, U64, int]:
    """Merged guest-physical ranges as ranges of *region*'s file, only whole pages of the file.

    Returns the bytes of all as well.
    """
    if native is not None:
        first, last = np.empty(start.size, np.uint64), np.empty(end.size, np.uint64)
        where = (region.guest_phys_addr, region.end, region.file_offset, region.page_size)
        count, size = native.in_file(start, end, first, last, where)
        return first[:count], last[:count], size
    first, last = inward(*_in_file(region, *_inside(region, start, end)), region.page_size)
    return first, last, int((last - first).sum())


def _in_file(region: MemoryRegion, start: U64, end: U64) -> tuple[U64, U64]:
    """Guest-physical ranges inside *region* as ranges of its file."""
    base, offset = np.uint64(region.guest_phys_addr), np.uint64(region.file_offset)
    return start - base + offset, end - base + offset


def _outward(first: U64, last: U64) -> tuple[U64, U64]:
    """Ranges grown to whole 4 KiB pages, merged: a page that is used in part is used."""
    unit = np.uint64(PAGE_SIZE)
    return coalesce(first // unit * unit, (last + unit - np.uint64(1)) // unit * unit)
