# SPDX-License-Identifier: Apache-2.0
"""Numbers for the descriptors of a back-end, which are kept beside its state."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from fdsocket import close_fds
from vballoon.errors import ProtocolError

__all__ = ("Descriptors", "Slots")


class Slots:
    """Numbers the descriptors of a back-end; a descriptor keeps its slot as long as it is used.

    A key is the object that owns the descriptor, and is kept alive from one state to the next, so
    that no other object can be taken for it.  Keys can own mappings: see :meth:`clear`.
    """

    def __init__(self) -> None:
        self._slots: dict[Hashable, int] = {}
        self._seen: dict[Hashable, int] = {}
        self._next = 1
        self._fds: dict[int, int] = {}

    def begin(self) -> None:
        """Begin a new state: slots that are not asked for again are given up."""
        self._slots, self._seen, self._fds = self._seen, {}, {}

    def end(self) -> dict[int, int]:
        """Return the descriptors of the state by slot; they stay the back-end's."""
        self._slots = {}  # what the state no longer names can be unmapped
        return self._fds

    def clear(self) -> None:
        """Let go of every key."""
        self._slots, self._seen, self._fds = {}, {}, {}

    def slot(self, key: Hashable, fd: int | None) -> int:
        """Return the slot of *fd*, which *key* identifies; 0 for None."""
        if fd is None:
            return 0
        slot = self._slots.get(key, self._next)
        self._next = max(self._next, slot + 1)
        self._seen[key], self._fds[slot] = slot, fd
        return slot

    def keep(self, key: Hashable, slot: int) -> None:
        """Let *key* have the *slot* that it had in another process."""
        if slot:
            self._seen[key] = slot
            self._next = max(self._next, slot + 1)


class Descriptors:
    """Descriptors handed over with a state, by slot; what nobody takes is closed."""

    def __init__(self, fds: Mapping[int, int]) -> None:
        self._fds = dict(fds)

    def take(self, slot: int) -> int:
        """Return the descriptor of *slot*, now the caller's.

        Raise :class:`~vballoon.errors.ProtocolError` ``state-descriptor`` if there is none (any
        more).
        """
        try:
            return self._fds.pop(slot)
        except KeyError:
            raise ProtocolError("state-descriptor", f"none in slot {slot}") from None

    def close(self) -> None:
        """Close what nobody took."""
        close_fds(list(self._fds.values()))
        self._fds.clear()
