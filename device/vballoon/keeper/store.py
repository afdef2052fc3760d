# SPDX-License-Identifier: Apache-2.0
"""The keeper's descriptors, by owner (a virtual machine's key) and name.

As in systemd, one open file is kept once: a second name for it is dropped, and the descriptor with
it.  A worker knows that, and its journal says which role each name has.
"""

from __future__ import annotations

from collections.abc import Iterable

from fdsocket import close_fds
from vballoon.keeper.kcmp import same_file
from vballoon.keeper.notify import NotifyError

__all__ = ("NAME_MAX", "OWNED_MAX", "Store")

OWNED_MAX = 768
"""Descriptors of one owner: 256 memory regions, three for each ring, and some more."""
NAME_MAX = 16
"""Characters of a name given by a worker.

All names of all machines must fit into LISTEN_FDNAMES, one environment string of at most 128 KiB.
"""


class Store:
    """See the module's docstring.  The store owns its descriptors."""

    def __init__(self) -> None:
        self._owned: dict[str, list[tuple[str, int]]] = {}

    def add(self, owner: str, name: str, fds: Iterable[int]) -> list[int]:
        """Take ownership of *fds* and return those that are new.

        What the store has already is closed.  Raise NotifyError where a limit is passed; then
        all *fds* are closed and nothing has changed.
        """
        fds = list(fds)
        owned = self._owned.setdefault(owner, [])
        if len(name) > NAME_MAX or len(owned) + len(fds) > OWNED_MAX:
            close_fds(fds)
            raise NotifyError("store-limit", f"{len(owned) + len(fds)} descriptors, {len(name)}")
        new = []
        for fd in fds:
            if any(same_file(fd, kept) for _, kept in owned):
                close_fds([fd])
            else:
                owned.append((name, fd))
                new.append(fd)
        return new

    def remove(self, owner: str, name: str) -> int:
        """Close every descriptor of *owner* with this *name*; return how many there were."""
        owned = self._owned.get(owner, [])
        gone = [fd for given, fd in owned if given == name]
        owned[:] = [entry for entry in owned if entry[0] != name]
        close_fds(gone)
        return len(gone)

    def of(self, owner: str) -> list[tuple[str, int]]:
        """Return the names and descriptors of *owner*; the store still owns them."""
        return list(self._owned.get(owner, []))

    def get(self, owner: str, name: str) -> int | None:
        """Return the first descriptor of *owner* with this *name*, which the store still owns."""
        return next((fd for given, fd in self._owned.get(owner, []) if given == name), None)

    def owners(self) -> list[str]:
        """Return the owners that have descriptors here."""
        return [owner for owner, owned in self._owned.items() if owned]

    def discard(self, owner: str) -> list[str]:
        """Close everything of *owner*; return the names."""
        owned = self._owned.pop(owner, [])
        close_fds([fd for _, fd in owned])
        return [name for name, _ in owned]
