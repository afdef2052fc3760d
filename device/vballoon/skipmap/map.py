# SPDX-License-Identifier: Apache-2.0
"""The skip bitmap of one guest: a bitmap for each provenance, and the rounds they come from."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vballoon.memory import PAGE_SIZE, PageRanges, data_extents
from vballoon.skipmap.bitmap import PageBitmap, combine
from vballoon.skipmap.layout import BitmapLayout
from vballoon.skipmap.rounds import VOIDS, Provenance, Round, RoundKind, RoundState, VoidReason
from vballoon.skipmap.store import BitmapStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vballoon.memory import GuestMemory, MemoryRegion

__all__ = ("SkipMap", "SkipMapState", "data_pages")

_SECTIONS = tuple(Provenance)


@dataclass(frozen=True, slots=True)
class SkipMapState:
    """What of a skip map outlives its process: bits whose validity is checked when used.

    Hinted and walked bits end with the process, and so do the rounds.
    """

    ballooned: PageRanges = field(default_factory=PageRanges)
    reported: PageRanges = field(default_factory=PageRanges)
    rounds: tuple[RoundState, ...] = ()


class SkipMap:
    """The pages of *memory* that may be left out, by provenance.

    Pages are of 4 KiB; page numbers are guest-physical addresses shifted right by 12.  The bits
    are in one memfd (:meth:`open_fd`), 1 bit for each page and provenance, and use memory only
    where a bit was set.

    *discards*: inflated and reported pages are discarded, so that a page in use again has data.
    """

    def __init__(self, memory: GuestMemory, *, discards: bool = True) -> None:
        self.memory = memory
        self.discards = discards
        self.driver_running = False
        """Whether the driver that made the bits is known to run: whether any ring runs."""
        self.layout = BitmapLayout(memory.regions)
        self._identities = [_identity(r) for r in sorted(memory.regions, key=_address)]
        self.rounds: dict[RoundKind, Round] = {}
        """The latest round of each kind."""
        self.poison: int | None = None
        """The value that the guest expects in free pages (PAGE_POISON), None if not negotiated."""
        self.dropped = 0
        """Number of ranges since the creation of the map that were not entirely guest memory."""
        self._store = BitmapStore(len(_SECTIONS), self.layout.words)
        self._bitmaps = {
            p: PageBitmap(self.layout, self._store.section(i), partial(self._store.spans, i))
            for i, p in enumerate(_SECTIONS)
        }
        self.set_driver_running(False)

    def bitmap(self, provenance: Provenance) -> PageBitmap:
        """Return the live bitmap of *provenance*; use :meth:`PageBitmap.copy` to keep it."""
        return self._bitmaps[provenance]

    def set_ranges(self, provenance: Provenance, pages: PageRanges) -> int:
        """Set the bits of *pages*.

        Return the number of ranges not entirely in guest memory; they are clipped.
        """
        return self._dropped(self._bitmaps[provenance].set_ranges(pages))

    def clear_ranges(self, provenance: Provenance, pages: PageRanges) -> int:
        """Clear the bits of *pages*; the result is as of :meth:`set_ranges`."""
        return self._dropped(self._bitmaps[provenance].clear_ranges(pages))

    def set_bytes(
        self, provenance: Provenance, addr: NDArray[np.uint64], length: NDArray[np.uint32]
    ) -> tuple[int, int]:
        """Set the bits of the whole pages in each ``[addr, addr + length)`` (bytes).

        Return the number of pages, and of ranges not aligned to pages.
        """
        pages, odd, clipped = self._bitmaps[provenance].set_bytes(addr, length)
        self._dropped(clipped)
        return pages, odd

    def set_records(
        self, provenance: Provenance, records: NDArray[Any], least: int
    ) -> tuple[int, int]:
        """Set the bits of ``WalkRange`` records that are entirely guest memory.

        Return their pages and the number of ignored records: those outside guest memory, and those
        that do not consist of aligned blocks of *least* pages (a power of two).
        """
        return self._bitmaps[provenance].set_records(records, least)

    def set_guest_records(
        self,
        provenance: Provenance,
        memory: GuestMemory,
        addr: NDArray[np.uint64],
        counts: NDArray[np.int64],
        least: int,
    ) -> tuple[int, int, int]:
        """Set the bits of *counts* records at each *addr* of *memory*, in one pass if possible.

        Return the number of leading buffers that were handled, their pages, and the number of
        ignored records.  The caller must copy the other buffers and call :meth:`set_records`.
        """
        return self._bitmaps[provenance].set_guest_records(memory, addr, counts, least)

    def _dropped(self, clipped: int) -> int:
        self.dropped += clipped
        return clipped

    def clear(self, provenance: Provenance) -> None:
        """Clear all bits of *provenance* and free their memory."""
        self._store.erase(_SECTIONS.index(provenance))

    def count(self, provenance: Provenance) -> int:
        """Return the number of pages whose bit is set."""
        return self._bitmaps[provenance].count()

    def extents(self, provenance: Provenance) -> PageRanges:
        """Return the pages whose bit is set."""
        return self._bitmaps[provenance].extents()

    def combined(self, *provenances: Provenance, into: PageBitmap | None = None) -> PageBitmap:
        """Return the union of *provenances* (default: all) as a copy, with reported bits as set.

        *into* is an earlier result whose memory may be reused.
        """
        return combine((self._bitmaps[p] for p in provenances or _SECTIONS), into)

    def set_driver_running(self, running: bool) -> None:
        """Note whether any ring runs, for :meth:`valid_now` and for readers of the descriptor."""
        self.driver_running = running
        self._store.note(driver_running=running, discards=self.discards)

    def valid_now(self, provenance: Provenance) -> PageBitmap:
        """Return the bits of *provenance* that may be used at this moment, as a copy.

        Reported and ballooned pages must still be holes in the backing file.  A guest can start
        anew into something that loads no driver, and nothing distinguishes that from a pause: its
        former balloon is then ordinary memory, and what has been touched is data.  Where nothing
        is discarded there are no holes to look at, so ballooned pages are valid only while the
        driver is known to run.  Hinted and walked bits have the rule of their round.
        """
        if provenance is Provenance.BALLOONED and not self.discards:
            kept = self._bitmaps[provenance]
            return kept.copy() if self.driver_running else PageBitmap(self.layout)
        if provenance in (Provenance.BALLOONED, Provenance.REPORTED):
            return self._holes(provenance)
        return self._bitmaps[provenance].copy()

    def _holes(self, provenance: Provenance) -> PageBitmap:
        """Return the pages of *provenance* that are holes; a page touched again is data."""
        result = self._bitmaps[provenance].copy()
        for region in self.memory.regions if result.spans() else ():
            result.clear_ranges(data_pages(region))
        return result

    # rounds

    def begin_round(self, round_: Round) -> None:
        """Begin *round_* with its bits empty.  Call this before its id is published."""
        former = self.rounds.get(round_.kind)
        if former is not None:
            former.void("superseded by a newer round")
        self.clear(round_.kind.provenance)
        self.rounds[round_.kind] = round_
        round_.changed = self._round_changed
        self._note(round_)

    def void(self, reason: VoidReason) -> None:
        """End the rounds and clear the bits that do not survive *reason*."""
        for round_ in self.rounds.values():
            round_.void(reason)
        for provenance in VOIDS[reason]:
            self.clear(provenance)
        self._store.note(generation=self._store.header().generation + 1)

    def _round_changed(self, round_: Round) -> None:
        self._note(
            round_
        )  # first the state, then the bits: a reader must not use a half-cleared map
        if round_.void_reason is not None:
            self.clear(round_.kind.provenance)
            self._store.note(generation=self._store.header().generation + 1)

    def _note(self, round_: Round) -> None:
        kind = round_.kind.value
        self._store.note(
            **{
                f"{kind}_state": round_.state,
                f"{kind}_round": round_.id & 0xFFFF_FFFF,
                f"{kind}_published": round_.published.monotonic_ns,
            }
        )

    # life

    def state(self) -> SkipMapState:
        """Return what outlives this process."""
        rounds = (self.rounds[kind] for kind in RoundKind if kind in self.rounds)
        return SkipMapState(
            self.extents(Provenance.BALLOONED),
            self.extents(Provenance.REPORTED),
            tuple(
                RoundState(r.id, r.kind, r.published, r.records, r.pages, r.bad_records)
                for r in rounds
            ),
        )

    def restore(self, state: SkipMapState) -> None:
        """Replace all bits and rounds by those of *state*; the rounds are void.

        Pages outside guest memory are dropped.
        """
        self.void(VoidReason.BACKEND_RESTARTED)
        self.set_restored(state)
        self.rounds = {}
        for kept in state.rounds:
            restored = self.rounds[kept.kind] = Round(
                id=kept.id,
                kind=kept.kind,
                published=kept.published,
                records=kept.records,
                pages=kept.pages,
                bad_records=kept.bad_records,
            )
            restored.void(VoidReason.BACKEND_RESTARTED)
            self._note(restored)

    def set_restored(self, state: SkipMapState) -> None:
        """Set the bits of *state*, also when more memory has come since it was restored."""
        self.set_ranges(Provenance.BALLOONED, state.ballooned)
        self.set_ranges(Provenance.REPORTED, state.reported)

    def rebuilt(self, memory: GuestMemory) -> SkipMap:
        """Return the map for a new memory table of the same guest; this map is void afterwards.

        Ballooned and reported bits of regions that are the same in both tables are kept; rounds
        are void.
        """
        successor = SkipMap(memory, discards=self.discards)
        successor.poison = self.poison
        successor.set_driver_running(self.driver_running)
        former = {identity: i for i, identity in enumerate(self._identities) if identity}
        for identity in successor._identities:
            if identity in former:
                for provenance in (Provenance.BALLOONED, Provenance.REPORTED):
                    runs = self.bitmap(provenance).region_extents(former[identity])
                    successor.set_ranges(provenance, runs)
        self.void(VoidReason.MEMORY_CHANGED)
        successor.rounds = dict(self.rounds)
        self.close()
        return successor

    def open_fd(self) -> int:
        """Return a new read-only descriptor of the live bits, which the caller closes."""
        return self._store.open_fd()

    def descriptor_layout(self) -> dict[str, Any]:
        """Return the offset of each bitmap in the descriptor of :meth:`open_fd`, in bytes."""
        return {
            "size": self._store.size,
            "page-size": PAGE_SIZE,
            "header-size": self._store.header().header_size,
            "bitmaps": [
                {
                    "provenance": provenance.value,
                    "guest-phys-addr": region.guest_phys_addr,
                    "region-size": region.size,
                    "offset": self._store.offset(i) + 8 * region.first_word,
                    "length": 8 * region.words,
                }
                for i, provenance in enumerate(_SECTIONS)
                for region in self.layout.regions
            ],
        }

    def close(self) -> None:
        """Void everything, also for holders of the descriptor, and free the memory."""
        for round_ in self.rounds.values():
            round_.changed = None
        self._store.close()


def data_pages(region: MemoryRegion) -> PageRanges:
    """Return the pages of *region* that hold data; a page with any data is data."""
    return data_extents(region).moved(region.guest_phys_addr).touched_pages()


def _address(region: MemoryRegion) -> int:
    return region.guest_phys_addr


def _identity(region: MemoryRegion) -> tuple[int, ...] | None:
    """Return values that are equal if a region of two memory tables is the same memory."""
    if region.fd is None:
        return None
    file = os.fstat(region.fd)
    place = (region.guest_phys_addr, region.size, region.file_offset)
    return (*place, file.st_dev, file.st_ino)
