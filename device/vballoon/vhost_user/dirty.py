# SPDX-License-Identifier: Apache-2.0
"""The dirty log that a front-end shares while it migrates the guest.

"Migration" of vhost-user.rst (QEMU 11.1.3): SET_LOG_BASE gives the log, SET_LOG_FD an event
descriptor to signal after the log has changed, and VHOST_F_LOG_ALL turns logging on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdsocket import close_fds
from virtio_formats.vhost_user import VhostFeature

if TYPE_CHECKING:
    from collections.abc import Callable

    from vballoon.memory import BitmapLog, DirtyLog
    from vballoon.vhost_user.io import Io
    from vballoon.vhost_user.memtable import MemoryTable

__all__ = ("FrontendLog",)


class FrontendLog:
    """The log of the memory in *table*; owns the log's event descriptor."""

    def __init__(self, table: MemoryTable, io: Io) -> None:
        self._table, self._io = table, io
        self.area: BitmapLog | None = None
        self.fd: int | None = None
        self._changed = False

    def set_area(self, area: BitmapLog, features: int) -> None:
        """SET_LOG_BASE: log to *area* from now on, if the *features* say so."""
        self.area = area
        self.apply(features)

    def set_fd(self, fd: int | None) -> None:
        """SET_LOG_FD: signal *fd* after changes; it is taken over."""
        if self.fd is not None:
            close_fds([self.fd])
        self.fd = fd

    def apply(self, features: int) -> None:
        """Log writes if, and only if, LOG_ALL is in the acknowledged *features* and a log is set.

        Call this after each change of the memory table or of the features.
        """
        log: DirtyLog | None = None
        if self.area is not None and features & VhostFeature.LOG_ALL:
            log = _Noticing(self.area, self._notice)
        self._table.memory.dirty_log = log

    def _notice(self) -> None:
        self._changed = True

    def announce(self) -> None:
        """Signal the front-end if the log has changed since the last call."""
        if self._changed and self.fd is not None:
            self._io.signal(self.fd)
        self._changed = False

    def close(self) -> None:
        """Close the event descriptor."""
        self.set_fd(None)


class _Noticing:
    """A dirty log that reports that it was written."""

    def __init__(self, inner: DirtyLog, notice: Callable[[], None]) -> None:
        self._inner, self._notice = inner, notice

    def mark(self, addr: int, length: int) -> None:
        """See :class:`~vballoon.memory.DirtyLog`."""
        self._inner.mark(addr, length)
        self._notice()
