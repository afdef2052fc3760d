# SPDX-License-Identifier: Apache-2.0
"""DMA logging: record which pages of client memory the device has written.

vfio-user specification (QEMU 11.1), ``VFIO_DEVICE_FEATURE_DMA_LOGGING_START`` to ``_REPORT``.
The log counts in pages of 4 KiB and formats a report to whatever page size the client asks for.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vfio_user.errors import RequestError
from virtio_formats.vfio_user import LoggingRange

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ("LOG_PAGE_SIZE", "MAX_LOG_RANGES", "DmaLog")

LOG_PAGE_SIZE = 4096
"""Bytes: the granularity that START answers with."""

MAX_LOG_RANGES = 65535
"""Ranges of one START: as many as there can be DMA maps."""

_CHUNK_PAGES = 1 << 15
_SPACE = 1 << 64


class DmaLog:
    """Records the pages written since the log was started, or since they were last reported."""

    def __init__(self) -> None:
        self.active = False
        self._ranges: tuple[LoggingRange, ...] = ()
        self._chunks: dict[int, NDArray[np.bool_]] = {}

    def start(self, page_size: int, ranges: Sequence[LoggingRange]) -> int:
        """Begin to log writes within *ranges* (none: everywhere); return the page size in bytes.

        Starting again keeps what is logged and takes the new ranges.  Raise
        :class:`~vfio_user.errors.RequestError` EINVAL for a page size that is not a power of two,
        or a range that wraps.
        """
        if page_size <= 0 or page_size & (page_size - 1):
            raise RequestError(errno.EINVAL, f"a page size of {page_size}")
        self.check([(r.iova, r.length) for r in ranges])
        self.active = True
        self._ranges = tuple(ranges)
        return LOG_PAGE_SIZE

    @property
    def ranges(self) -> tuple[tuple[int, int], ...] | None:
        """Return the ranges (iova, length in bytes) that are logged; None while inactive."""
        return tuple((r.iova, r.length) for r in self._ranges) if self.active else None

    def check(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Raise :class:`~vfio_user.errors.RequestError` EINVAL for an empty or wrapping range."""
        if len(ranges) > MAX_LOG_RANGES:
            raise RequestError(errno.EINVAL, f"{len(ranges)} logging ranges")
        if any(not length or iova + length > _SPACE for iova, length in ranges):
            raise RequestError(errno.EINVAL, "a logging range that is empty or wraps")

    def restore(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Log writes within checked *ranges*; the caller marks what may have been written."""
        self.active = True
        self._ranges = tuple(LoggingRange(iova=iova, length=length) for iova, length in ranges)

    def stop(self) -> None:
        """Stop logging, and forget what was logged."""
        self.active = False
        self._ranges = ()
        self._chunks.clear()

    def mark(self, addr: int, size: int) -> None:
        """Log that the device wrote *size* bytes at DMA address *addr*."""
        if not self.active or size <= 0:
            return
        for low, high in self._logged(addr, addr + size):
            self._set(low // LOG_PAGE_SIZE, -(-high // LOG_PAGE_SIZE))

    def _logged(self, low: int, high: int) -> list[tuple[int, int]]:
        if not self._ranges:
            return [(low, high)]
        cut = [(max(low, r.iova), min(high, r.iova + r.length)) for r in self._ranges]
        return [(a, b) for a, b in cut if a < b]

    def _set(self, page: int, end: int) -> None:
        import numpy as np  # not before it is used: it takes longer to import than all the rest

        while page < end:
            chunk, offset = divmod(page, _CHUNK_PAGES)
            stop = min(end - page, _CHUNK_PAGES - offset)
            bits = self._chunks.setdefault(chunk, np.zeros(_CHUNK_PAGES, np.bool_))
            bits[offset : offset + stop] = True
            page += stop

    def report(self, iova: int, length: int, page_size: int, limit: int) -> bytes:
        """Return the bitmap of [*iova*, *iova* + *length*), one bit for each *page_size* bytes.

        Whole 64-bit words in the host's byte order, bits past the range zero.  What is reported
        is forgotten.  Raise :class:`~vfio_user.errors.RequestError` EINVAL when not logging, for
        a range or page size that is not aligned, and for a bitmap of more than *limit* bytes.
        """
        if not self.active:
            raise RequestError(errno.EINVAL, "DMA logging is not started")
        if page_size <= 0 or page_size & (page_size - 1):
            raise RequestError(errno.EINVAL, f"a page size of {page_size}")
        unit = min(page_size, LOG_PAGE_SIZE)
        if iova % unit or not length or iova + length > _SPACE:
            raise RequestError(errno.EINVAL, f"a report of {iova:#x}+{length:#x}")
        bits = -(-length // page_size)
        if -(-bits // 64) * 8 > limit:
            raise RequestError(errno.EINVAL, f"a bitmap of {bits} bits")
        return _words(self._collect(iova, length, page_size, bits))

    def _collect(self, iova: int, length: int, page_size: int, bits: int) -> NDArray[np.bool_]:
        import numpy as np

        found = np.zeros(bits, np.bool_)
        first, last = iova // LOG_PAGE_SIZE, -(-(iova + length) // LOG_PAGE_SIZE)
        for chunk, pages in self._chunks.items():  # few; a client may ask for 2^64 bytes
            base = chunk * _CHUNK_PAGES
            if base >= last or base + _CHUNK_PAGES <= first:
                continue
            low, high = max(first - base, 0), min(last - base, _CHUNK_PAGES)
            for page in (np.flatnonzero(pages[low:high]) + low + base).tolist():
                start = max(page * LOG_PAGE_SIZE - iova, 0)
                end = min((page + 1) * LOG_PAGE_SIZE - iova, length)
                found[start // page_size : -(-end // page_size)] = True
            # A page of which only a part was asked for is still to be reported for the rest.
            whole = max(-(-iova // LOG_PAGE_SIZE) - base, 0)
            pages[whole : min((iova + length) // LOG_PAGE_SIZE - base, _CHUNK_PAGES)] = False
        return found


def _words(bits: NDArray[np.bool_]) -> bytes:
    import numpy as np

    packed = np.packbits(bits, bitorder="little").tobytes()
    words = np.frombuffer(packed + bytes(-len(packed) % 8), "<u8")
    return words.astype("=u8").tobytes()
