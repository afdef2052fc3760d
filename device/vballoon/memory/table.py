# SPDX-License-Identifier: Apache-2.0
"""Guest memory as a table of regions: bounds checks, translation, reading and writing.

Whole batches of addresses are checked at once, in 64-bit arithmetic that is arranged so that it
cannot overflow: an address is compared by its distance from a region's start, never by adding a
length that the guest chose.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from vballoon.errors import MemoryFault, ProtocolError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vballoon.memory.dirty_log import DirtyLog
    from vballoon.memory.regions import MemoryRegion
    from vballoon.native import Tables

    U32 = NDArray[np.uint32]
    U64 = NDArray[np.uint64]

__all__ = ("GuestMemory",)


class GuestMemory:
    """An immutable table of regions, sorted by guest-physical address; a change makes a new one.

    ``dirty_log`` is the exception: it may be set and taken away while the table stays, and gets
    the pages that the device itself writes.  Overlapping regions raise
    :class:`~vballoon.errors.ProtocolError` ``memory-region-overlap``.
    """

    def __init__(
        self, regions: Iterable[MemoryRegion] = (), *, dirty_log: DirtyLog | None = None
    ) -> None:
        self.regions = tuple(sorted(regions, key=lambda r: r.guest_phys_addr))
        self.dirty_log = dirty_log
        for low, high in pairwise(self.regions):
            if low.end > high.guest_phys_addr:
                raise ProtocolError("memory-region-overlap", f"{low} {high}")
        self.size = sum(r.size for r in self.regions)
        self.end = self.regions[-1].end if self.regions else 0
        self._starts = [r.guest_phys_addr for r in self.regions]
        self._start_column = np.array(self._starts, np.uint64)
        self._size_column = np.array([r.size for r in self.regions], np.uint64)
        self._spans = _joined(self.regions)
        self._extents = _rows((r.guest_phys_addr, r.size) for r in self.regions)
        self._span_rows = _rows(self._spans)

    @property
    def lost(self) -> bool:
        """Whether an access to any region has failed, so that no ring may use this table."""
        return any(region.lost for region in self.regions)

    @property
    def mapped(self) -> bool:
        """Whether every region has a mapping (and there is one)."""
        return bool(self.regions) and all(r.view is not None for r in self.regions)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """``(start, size)`` in bytes of each run of regions without a gap, in address order."""
        return self._spans

    @property
    def tables(self) -> Tables:
        """For compiled loops: regions and spans (uint64[k, 2]: start, size, in bytes), and what
        each region is mapped at now.

        To be used at once and not kept: it keeps the mappings.
        """
        return self._extents, self._span_rows, [region.view for region in self.regions]

    def contains(self, addr: U64, length: U64 | U32) -> NDArray[np.bool_]:
        """Which ranges lie wholly in guest memory (bool[n]); they may span adjacent regions.

        *addr* (uint64[n]) and *length* (uint64[n] or uint32[n]) are bytes.  An empty range
        counts as inside where its address is inside, or one past the end.
        """
        size64 = length.astype(np.uint64)
        longest = int(size64.max()) if size64.size else 0
        inside = None
        for start, size in self._spans:
            # Below the span the subtraction wraps to something larger than any span, and with no
            # length above the span's size nothing else can wrap.
            within = addr - np.uint64(start) <= np.uint64(size) - size64
            if longest > size:
                within &= size64 <= size
            inside = within if inside is None else inside | within
        return np.zeros(addr.shape, np.bool_) if inside is None else inside

    def holds(self, addr: int, length: int) -> bool:
        """:meth:`contains` for a single range of plain integers."""
        return any(
            start <= addr <= start + size and length <= start + size - addr
            for start, size in self._spans
        )

    def locate(self, addr: U64, length: U64) -> tuple[NDArray[np.intp], U64]:
        """Return the region of each range (index into ``regions``) and the offset in it (bytes).

        Raises :class:`~vballoon.errors.MemoryFault` unless each range lies within one region.
        """
        index = np.searchsorted(self._start_column, addr, side="right") - 1
        if addr.size and (not self.regions or index.min() < 0):
            raise MemoryFault("memory-address", "below guest memory")
        offset = addr - self._start_column[index]
        size = self._size_column[index]
        bad = (offset > size) | (length > size - offset)
        if bad.any():
            at = int(np.argmax(bad))
            raise MemoryFault("memory-address", f"{int(addr[at]):#x}+{int(length[at]):#x}")
        return index, offset

    def window(self, addr: int, length: int) -> NDArray[np.uint8]:
        """Return the mapped bytes (uint8[length]) without a copy.

        Raises :class:`~vballoon.errors.MemoryFault` when the range is outside guest memory, in
        more than one region, or in memory without a mapping.
        """
        region = self._region(addr)
        offset = addr - region.guest_phys_addr
        if region.view is None or length < 0 or length > region.size - offset:
            raise MemoryFault("memory-window", f"{addr:#x}+{length:#x}")
        return region.view[offset : offset + length]

    def read(self, addr: int, length: int) -> bytes:
        """*length* bytes at *addr*, from any kind of memory, adjacent regions joined.

        Raises :class:`~vballoon.errors.MemoryFault` for a range outside guest memory.
        """
        return b"".join(
            region.view[offset : offset + size].tobytes()
            if region.view is not None
            else _remote_read(region, region.guest_phys_addr + offset, size)
            for region, offset, size in self._pieces(addr, length)
        )

    def write(self, addr: int, data: bytes) -> None:
        """Store *data* at *addr* and mark the pages in the dirty log, if there is one.

        Raises :class:`~vballoon.errors.MemoryFault` (nothing is written then) for a range outside
        guest memory or in a region that is mapped read-only.
        """
        done = 0
        pieces = self._pieces(addr, len(data))
        if any(r.view is not None and not r.view.flags.writeable for r, _, _ in pieces):
            raise MemoryFault("memory-read-only", f"{addr:#x}+{len(data):#x}")
        for region, offset, size in pieces:
            part = data[done : done + size]
            if region.view is not None:
                region.view[offset : offset + size] = np.frombuffer(part, np.uint8)
            else:
                _remote_write(region, region.guest_phys_addr + offset, part)
            done += size
        if self.dirty_log is not None and done:
            self.dirty_log.mark(addr, done)

    def from_userspace(self, addr: int) -> int:
        """Return the guest-physical address of the front-end's virtual address *addr*.

        Raises :class:`~vballoon.errors.MemoryFault` when no region holds it.
        """
        for region in self.regions:
            if 0 <= addr - region.userspace_addr < region.size:
                return region.guest_phys_addr + addr - region.userspace_addr
        raise MemoryFault("memory-userspace", f"{addr:#x}")

    def close(self) -> None:
        """Close every region."""
        for region in self.regions:
            region.close()

    def _region(self, addr: int) -> MemoryRegion:
        index = bisect_right(self._starts, addr) - 1
        if index < 0 or addr >= self.regions[index].end:
            raise MemoryFault("memory-address", f"{addr:#x}")
        return self.regions[index]

    def _pieces(self, addr: int, length: int) -> list[tuple[MemoryRegion, int, int]]:
        """Return the range split at region borders: (region, offset in it, bytes)."""
        pieces: list[tuple[MemoryRegion, int, int]] = []
        while length > 0:
            region = self._region(addr)
            offset = addr - region.guest_phys_addr
            size = min(length, region.size - offset)
            pieces.append((region, offset, size))
            addr, length = addr + size, length - size
        return pieces


def _rows(pairs: Iterable[tuple[int, int]]) -> U64:
    return np.array(list(pairs), np.uint64).reshape(-1, 2)


def _joined(regions: tuple[MemoryRegion, ...]) -> tuple[tuple[int, int], ...]:
    spans: list[tuple[int, int]] = []
    for region in regions:
        if spans and sum(spans[-1]) == region.guest_phys_addr:
            spans[-1] = (spans[-1][0], spans[-1][1] + region.size)
        else:
            spans.append((region.guest_phys_addr, region.size))
    return tuple(spans)


def _remote_read(region: MemoryRegion, addr: int, size: int) -> bytes:
    if region.remote is None:
        raise MemoryFault("memory-unmapped", f"{addr:#x}+{size:#x}")
    data = region.remote.dma_read(addr, size)
    if len(data) != size:
        raise MemoryFault("memory-short-read", f"{len(data)} of {size} bytes at {addr:#x}")
    return data


def _remote_write(region: MemoryRegion, addr: int, data: bytes) -> None:
    if region.remote is None:
        raise MemoryFault("memory-unmapped", f"{addr:#x}+{len(data):#x}")
    region.remote.dma_write(addr, data)
