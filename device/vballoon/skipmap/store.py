# SPDX-License-Identifier: Apache-2.0
"""The memory of the bitmaps: one sealed memfd, so that its descriptor can be handed out.

Page 0 is the live header (``vballoon_spec.skipmap.live``).  The bitmaps follow, each a whole number
of pages.  No page is touched before a bit is set, so the bitmaps of an idle 16 TiB guest use no
memory.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

from vballoon.errors import ProtocolError, UsageError
from vballoon.memory.pages import PAGE_SHIFT, PAGE_SIZE
from vballoon_spec.skipmap import LIVE_MAGIC, LIVE_VERSION, LiveHeader

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("BitmapStore",)

HEADER_BYTES = PAGE_SIZE
"""The header has a page of its own, so that the bits can be mapped."""
_F_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h, since Linux 5.1; not in Python 3.11


class BitmapStore:
    """*sections* bitmaps of *words* words each (a multiple of 512), all zero.

    Raise :class:`~vballoon.errors.ProtocolError` ``memory-too-large`` if this host cannot map
    that much.
    """

    _fd = -1

    def __init__(self, sections: int, words: int) -> None:
        self.section_bytes = 8 * words
        self._sections = sections
        self._sealed = False
        self.size = HEADER_BYTES + sections * self.section_bytes
        self._fd = os.memfd_create("vballoon-skipmap", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, self.size)
            os.fchmod(self._fd, 0o400)  # a holder of a descriptor cannot open it for writing
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._map = mmap.mmap(self._fd, self.size)
        except (OSError, OverflowError, ValueError) as error:
            os.close(self._fd)
            self._fd = -1
            raise ProtocolError(
                "memory-too-large", f"{self.size} bytes of bitmap: {error}"
            ) from None
        self._header = np.frombuffer(self._map, dtype=LiveHeader.dtype(), count=1)
        for name, value in (
            ("version", LIVE_VERSION),
            ("header_size", HEADER_BYTES),
            ("live", 1),
            ("page_shift", PAGE_SHIFT),
            ("magic", np.frombuffer(LIVE_MAGIC, dtype=np.uint8)),
        ):
            self._header[name] = value

    def section(self, index: int) -> NDArray[np.uint64]:
        """Return the words of bitmap *index*, valid at least until :meth:`close`."""
        return np.frombuffer(
            self._map, dtype="<u8", count=self.section_bytes // 8, offset=self.offset(index)
        )

    def offset(self, index: int) -> int:
        """Return the offset in bytes of bitmap *index* in the descriptor."""
        return HEADER_BYTES + index * self.section_bytes

    def spans(self, index: int) -> list[tuple[int, int]]:
        """Return the runs of words of bitmap *index* that have memory; all others are zero."""
        if self._fd < 0:
            return []
        start, end = self.offset(index), self.offset(index) + self.section_bytes
        found, at = [], start
        while at < end:
            try:
                low = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # no data after this offset
            if low >= end:
                break
            at = min(os.lseek(self._fd, low, os.SEEK_HOLE), end)
            found.append(((low - start) // 8, (at - start) // 8))
        return found

    def erase(self, index: int) -> None:
        """Clear all bits of bitmap *index*; free its memory unless a descriptor was handed out."""
        if self._sealed:
            words = self.section(index)
            for low, high in self.spans(index):
                words[low:high] = 0
        elif self.section_bytes:
            self._map.madvise(mmap.MADV_REMOVE, self.offset(index), self.section_bytes)

    def note(self, **fields: int) -> None:
        """Set fields of the live header."""
        for name, value in fields.items():
            self._header[name] = value

    def header(self) -> LiveHeader:
        """Return the current live header."""
        return LiveHeader.parse(self._header.tobytes())

    def open_fd(self) -> int:
        """Return a new read-only descriptor of the whole; the caller closes it.

        From the first one on, nobody can open or map the memory for writing, not even a process of
        this user that opens the descriptor again: a bit that is set here may lose a page. The seal
        also forbids hole punching, so the memory is freed only with the last descriptor.
        """
        if self._fd < 0:
            raise UsageError("the skip bitmap is closed: no guest memory is attached")
        if not self._sealed:
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
            self._sealed = True
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Void and free everything; holders of a descriptor see empty bitmaps that are not live."""
        if self._fd < 0:
            return
        self.note(live=0, generation=int(self._header["generation"][0]) + 1)
        for index in range(self._sections):
            self.erase(index)
        os.close(self._fd)
        self._fd = -1

    def __del__(self) -> None:
        self.close()
