# SPDX-License-Identifier: Apache-2.0
"""The keeper's own descriptors in the store of systemd, so that the keeper can be replaced too.

Without systemd there is nothing above the keeper; then a barrier is over at once.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from fdsocket import close_fds
from vballoon.keeper.notifier import Notifier
from vballoon.keeper.notify import build_barrier

__all__ = ("Upstream", "full_name", "split_name")


def full_name(owner: str, name: str) -> str:
    """Return the name under which *owner*'s descriptor *name* is in systemd's store."""
    return f"{owner}.{name}"


def split_name(name: str) -> tuple[str, str] | None:
    """Return owner and name of a descriptor that came back; None for any other name."""
    owner, dot, rest = name.partition(".")
    return (owner, rest) if dot and owner and rest else None


class Upstream:
    """What the keeper sends to systemd."""

    def __init__(self, notifier: Notifier | None) -> None:
        self.notifier = notifier

    @property
    def keeps(self) -> bool:
        """Whether our descriptors outlive this process; systemd 254 sets FDSTORE then."""
        return self.notifier is not None and os.environ.get("FDSTORE", "0") != "0"

    def store(self, owner: str, name: str, fds: list[int]) -> None:
        """Store *fds*, which the caller still owns."""
        if self.notifier is not None:
            for fd in fds:
                self.notifier.store(full_name(owner, name), fd)

    def remove(self, owner: str, name: str) -> None:
        """Remove all descriptors of this name."""
        if self.notifier is not None:
            self.notifier.remove(full_name(owner, name))

    def send(self, text: bytes) -> None:
        """Send a report: READY, STATUS, WATCHDOG."""
        if self.notifier is not None:
            self.notifier.send(text)

    def barrier(self, done: Callable[[], None]) -> None:
        """Call *done* once systemd has handled everything that was sent before."""
        if self.notifier is None or not self.notifier.alive:
            done()
            return
        reader, writer = os.pipe()
        self.notifier.send(build_barrier(), [writer])
        os.close(writer)
        loop = asyncio.get_running_loop()

        def closed() -> None:
            loop.remove_reader(reader)
            close_fds([reader])
            done()

        loop.add_reader(reader, closed)
