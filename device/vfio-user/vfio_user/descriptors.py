# SPDX-License-Identifier: Apache-2.0
"""The client's descriptors that a device holds, each with a slot number that names it in a state.

A slot is the smallest number that is free when the descriptor arrives, and stays the same until
the descriptor is closed, whatever the descriptor's number in this process is.
"""

from __future__ import annotations

import heapq
import os

__all__ = ("Descriptors",)


class Descriptors:
    """Owns descriptors, and numbers them."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}  # descriptor to slot
        self._used: set[int] = set()
        self._given_up: list[int] = []  # a heap of slots, of which some may be used again
        self._end = 0  # every slot below was used at some time

    def take(self, fd: int) -> None:
        """Take *fd* over, in the smallest free slot."""
        slot = self._free()
        self._slots[fd] = slot
        self._used.add(slot)

    def _free(self) -> int:
        while self._given_up:
            slot = heapq.heappop(self._given_up)
            if slot not in self._used:
                return slot
        while self._end in self._used:
            self._end += 1
        return self._end

    def adopt(self, slot: int, fd: int) -> int:
        """Duplicate *fd* into *slot*, which must be free; return the duplicate."""
        own = os.dup(fd)
        self._slots[own] = slot
        self._used.add(slot)
        return own

    def give_up(self, fd: int) -> None:
        """Return *fd* to the caller's care."""
        slot = self._slots.pop(fd)
        self._used.discard(slot)
        heapq.heappush(self._given_up, slot)

    def close(self, fd: int | None) -> None:
        """Close *fd*; None is passed over."""
        if fd is not None:
            self.give_up(fd)
            os.close(fd)

    def holds(self, fd: int) -> bool:
        """Return whether *fd* is owned here."""
        return fd in self._slots

    def slot(self, fd: int | None) -> int | None:
        """Return the slot of *fd*, None for None."""
        return None if fd is None else self._slots[fd]

    def by_slot(self) -> dict[int, int]:
        """Return the descriptors by slot; they stay here."""
        return {slot: fd for fd, slot in sorted(self._slots.items(), key=lambda item: item[1])}
