# SPDX-License-Identifier: Apache-2.0
"""The log of pages that the device itself writes, as a migrating front-end wants it.

The vhost log is a bitmap in shared memory, one bit per 4 KiB page, least significant bit first.
The front-end fetches and clears it, a word at a time with an atomic exchange, while the device
sets bits.  Setting one bit is a read-modify-write; done without atomicity it could put back bits
that were just cleared (harmless) or undo another writer's bit (a page lost in migration).  Python
has no atomic OR, and does not need one: a byte store of 0xFF is a single store, can undo nobody's
bit, and marks at most seven neighbouring pages too many.  Reporting too much is always allowed,
and a balloon writes little but its used rings, so the log is rounded to groups of eight pages
(32 KiB).

Label: "Migration" in QEMU's docs/interop/vhost-user.rst (VHOST_LOG_PAGE is 0x1000).
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from vballoon.errors import ProtocolError
from vballoon.memory import fence
from vballoon.native import guard

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("VHOST_LOG_PAGE", "BitmapLog", "DirtyLog")

VHOST_LOG_PAGE = 0x1000
"""Bytes of guest memory for each bit of the log."""

_GROUP = VHOST_LOG_PAGE * 8


class DirtyLog(Protocol):
    """Who wants to know which guest memory the device has written."""

    def mark(self, addr: int, length: int) -> None:
        """*length* bytes at guest-physical *addr* have been written."""


class BitmapLog:
    """A vhost log bitmap on a byte view; also good for any bitmap with the same meaning.

    ``overruns`` counts the writes (in calls of :meth:`mark`) that fell past the end of the log.
    """

    def __init__(self, bitmap: NDArray[np.uint8]) -> None:
        self.bitmap = bitmap
        self.overruns = 0

    @classmethod
    def map(cls, fd: int, size: int, offset: int) -> Self:
        """Map *size* bytes of the log file *fd* from *offset* on; take over *fd*.

        Raises :class:`~vballoon.errors.ProtocolError` ``log-region`` when that is not possible.
        """
        try:
            start = offset - offset % mmap.ALLOCATIONGRANULARITY
            if size <= 0 or offset < 0 or offset + size > os.fstat(fd).st_size:
                raise ProtocolError("log-region", f"{offset:#x}+{size:#x} is not in the file")
            mapping = mmap.mmap(fd, offset + size - start, offset=start)
        except (OSError, ValueError, OverflowError) as error:
            raise ProtocolError("log-region", str(error)) from None
        finally:
            try:
                os.close(fd)
            except OSError:
                pass  # not an open descriptor: the error is already on its way
        view = np.frombuffer(mapping, np.uint8, count=size, offset=offset - start)
        guard.watch(view)
        return cls(view)

    def mark(self, addr: int, length: int) -> None:
        """Mark the pages of *length* bytes at *addr* (and their neighbours in the same byte)."""
        if length <= 0:
            return
        first, end = addr // _GROUP, (addr + length - 1) // _GROUP + 1
        if end > self.bitmap.size:
            self.overruns += 1
        # The page's own bytes must be out before its bit: who sees the bit copies the page.
        fence.release()
        self.bitmap[first:end] = 0xFF
