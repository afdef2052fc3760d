# SPDX-License-Identifier: Apache-2.0
"""A worker's side of the store: which of its descriptors are kept, and under which names.

A *role* is one descriptor of the state, whose number is not used for another one; the journal maps
roles to names.  A name belongs to one open file and is never used again.  Several roles can share
one, because the supervisor keeps an open file once, and drops a second name for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fdsocket import close_fds
from vballoon.keeper.kcmp import same_file

if TYPE_CHECKING:
    from vballoon.keeper.notifier import Notifier

__all__ = ("Keeping",)


class Keeping:
    """The descriptors of one worker.

    *names* maps roles to names as the journal says; *stored* are the names that the store has,
    with a descriptor for each, which is taken over: it is what a new one is compared with.
    """

    def __init__(
        self, notifier: Notifier, names: Mapping[str, str], stored: Mapping[str, int]
    ) -> None:
        self._notifier = notifier
        self.names: dict[str, str] = dict(names)
        self._stored = dict(stored)
        self._next = 1 + max((int(n[1:]) for n in self._stored if n[1:].isdigit()), default=0)

    def update(self, current: Mapping[str, int]) -> None:
        """Make the store hold *current*, and wait until it does; what is unused stays for now."""
        names: dict[str, str] = {}
        fresh = False
        for role, fd in current.items():
            name = self.names.get(role) or self._name_of(fd)
            if name is None:
                name, self._next = f"n{self._next}", self._next + 1
                self._notifier.store(name, fd)
                self._stored[name] = os.dup(fd)
                fresh = True
            names[role] = name
        self.names = names
        if fresh:
            self._notifier.barrier()

    def _name_of(self, fd: int) -> str | None:
        """Return the name under which the open file of *fd* is stored already."""
        return next((n for n, kept in self._stored.items() if same_file(fd, kept)), None)

    def settle(self) -> None:
        """Remove every name from the store that no role uses."""
        for name in sorted(self._stored.keys() - set(self.names.values())):
            self._notifier.remove(name)
            close_fds([self._stored.pop(name)])
