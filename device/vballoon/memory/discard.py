# SPDX-License-Identifier: Apache-2.0
"""Give guest memory back to the host: the only place that frees any.

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

from vballoon.memory.pages import PAGE_SIZE
from vballoon.memory.ranges import ByteRanges
from vballoon.native import native

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vballoon.memory.ranges import PageRanges
    from vballoon.memory.regions import MemoryRegion
    from vballoon.memory.table import GuestMemory

__all__ = ("Discarder",)

log = logging.getLogger(__name__)

_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02  # FALLOC_FL_*, <linux/falloc.h>

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_fallocate.restype = ctypes.c_int


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free *length* bytes of the file *fd* from *offset* on.  Raise OSError if refused."""
    while _fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def punch_holes(fd: int, ranges: ByteRanges) -> tuple[int, int]:
    """Free *ranges* of the file *fd* until one cannot be freed.

    Return the number of ranges freed and the error number (0: none failed).
    """
    if native is not None:
        return native.punch(fd, ranges.start, ranges.end)
    for done, (begin, end) in enumerate(ranges):
        try:
            punch_hole(fd, begin, end - begin)
        except OSError as error:
            return done, error.errno or errno.EIO
    return len(ranges), 0


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

    def discard(self, memory: GuestMemory, ranges: ByteRanges, *, accumulate: bool = False) -> int:
        """Free the guest-physical *ranges*.  Return the number of bytes freed.

        What is not guest memory, or not a whole page of the backing file, is left alone.  With
        *accumulate*, parts of huge pages are remembered until :meth:`undo` takes them back, and a
        huge page is freed with its last part; only for pages that the guest does not touch before
        they are undone.
        """
        if not self.enabled:
            return 0
        freed = 0
        for region in memory.regions:
            if region.fd is None or region in self._unpunchable:
                continue
            if accumulate and region.page_size > PAGE_SIZE:
                units = self._completed(region, _in_file(region, ranges))
            else:
                units = _units_in_file(region, ranges)
            freed += self._punch(region, units)
        return freed

    def undo(self, memory: GuestMemory, ranges: ByteRanges) -> None:
        """Forget that the guest gave *ranges*: their huge pages are not complete any more."""
        if not self._given:
            return
        for region in memory.regions:
            given = self._given.get(region)
            if given is not None:
                used = _in_file(region, ranges).touched_pages()
                given[_pieces(region, used)] = False

    def forget(self) -> None:
        """Forget all parts of huge pages (device reset): every page may be in use again."""
        self._given.clear()

    def _completed(self, region: MemoryRegion, ranges: ByteRanges) -> ByteRanges:
        """Return the huge pages touched by *ranges* of which every part has now been given."""
        per_page = region.page_size // PAGE_SIZE
        given = self._given.get(region)
        if given is None:
            end = region.file_offset + region.size
            pages = -(-end // region.page_size) - region.file_offset // region.page_size
            given = self._given[region] = np.zeros(pages * per_page, np.bool_)
        pieces = _pieces(region, ranges.pages())
        given[pieces] = True
        touched = pieces // per_page
        touched = touched[np.concatenate(([True], touched[1:] != touched[:-1]))[: touched.size]]
        whole = touched[given.reshape(-1, per_page)[touched].all(axis=1)]
        page = np.uint64(region.page_size)
        begin = (whole.astype(np.uint64) + np.uint64(region.file_offset // region.page_size)) * page
        return ByteRanges(begin, begin + page)

    def _punch(self, region: MemoryRegion, ranges: ByteRanges) -> int:
        """Free *ranges* of the file of *region*.  Return the number of bytes freed."""
        assert region.fd is not None
        if not len(ranges):
            return 0
        if region.view is not None and not region.view.flags.writeable:
            done, error = 0, errno.EROFS  # what is mapped read-only must not change through us
        else:
            done, error = punch_holes(region.fd, ranges)
        if not error:
            return ranges.total
        self._unpunchable.add(region)
        self.refused += 1
        log.warning(
            "memory at %#x cannot be given back: %s", region.guest_phys_addr, os.strerror(error)
        )
        return int((ranges.end[:done] - ranges.start[:done]).sum())


def _units_in_file(region: MemoryRegion, ranges: ByteRanges) -> ByteRanges:
    """Return guest-physical *ranges* as ranges of *region*'s file, only whole pages of the file."""
    if native is not None:
        first, last = np.empty(len(ranges), np.uint64), np.empty(len(ranges), np.uint64)
        where = (region.guest_phys_addr, region.end, region.file_offset, region.page_size)
        count, size = native.in_file(ranges.start, ranges.end, first, last, where)
        return ByteRanges.merged(first[:count], last[:count], size)
    return _in_file(region, ranges).whole(region.page_size)


def _in_file(region: MemoryRegion, ranges: ByteRanges) -> ByteRanges:
    """Return the part of guest-physical *ranges* inside *region* as ranges of its file."""
    inside = ranges.clip(region.guest_phys_addr, region.end)
    return inside.moved(region.file_offset - region.guest_phys_addr)


def _pieces(region: MemoryRegion, pages: PageRanges) -> NDArray[np.intp]:
    """Return the 4 KiB pages of the file, counted from *region*'s first huge page, ascending."""
    base = region.file_offset // region.page_size * (region.page_size // PAGE_SIZE)
    return pages.numbers().astype(np.intp) - base
