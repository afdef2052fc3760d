# SPDX-License-Identifier: Apache-2.0
"""A worker's side of the store: which of its descriptors are kept, and under which names.

A *role* is what a descriptor is for (``kick3``); the journal maps roles to names.  A name is used
for one open file and never again.  Several roles can share a name, because the supervisor keeps an
open file once (memory below and above 4 GiB is one file).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from vballoon.keeper.kcmp import same_file

if TYPE_CHECKING:
    from vballoon.keeper.notifier import Notifier

__all__ = ("Keeping",)

Identity = tuple[int, int, int]


class Keeping:
    """The descriptors of one worker.

    *names* maps roles to names as the journal says; *stored* are the names that the store has.
    """

    def __init__(
        self, notifier: Notifier, names: Mapping[str, str], stored: Iterable[str] = ()
    ) -> None:
        self._notifier = notifier
        self.names: dict[str, str] = dict(names)
        self._stored = set(stored)
        self._known: dict[str, tuple[Identity, int]] = {}
        self._next = 1 + max((int(n[1:]) for n in self._stored if n[1:].isdigit()), default=0)

    def adopt(self, current: Mapping[str, int]) -> None:
        """Take *current*, descriptors by role, for those that the store has under these names."""
        self._known = {role: (_identity(fd), fd) for role, fd in current.items()}

    def update(self, current: Mapping[str, int]) -> None:
        """Make the store hold *current*, and wait until it does; what is unused stays for now."""
        known: dict[str, tuple[Identity, int]] = {}
        names: dict[str, str] = {}
        fresh = False
        for role, fd in current.items():
            identity = _identity(fd)
            if self._known.get(role, (None,))[0] == identity:
                names[role] = self.names[role]
            else:
                name = self._name_of(fd, known, names)
                if name is None:
                    name, self._next = f"n{self._next}", self._next + 1
                    self._notifier.store(name, fd)
                    self._stored.add(name)
                    fresh = True
                names[role] = name
            known[role] = (identity, fd)
        self._known, self.names = known, names
        if fresh:
            self._notifier.barrier()

    def _name_of(
        self, fd: int, known: Mapping[str, tuple[Identity, int]], names: Mapping[str, str]
    ) -> str | None:
        """The name under which the open file of *fd* is stored for another role."""
        for role, (_, other) in known.items():
            if same_file(fd, other):
                return names[role]
        return None

    def settle(self, others: set[str]) -> None:
        """Remove every name from the store that neither a role nor *others* uses."""
        unused = self._stored - set(self.names.values()) - others
        for name in sorted(unused):
            self._notifier.remove(name)
        self._stored -= unused


def _identity(fd: int) -> Identity:
    """What changes when a role gets another file: a number is not reused within one message."""
    stat = os.fstat(fd)
    return fd, stat.st_dev, stat.st_ino
