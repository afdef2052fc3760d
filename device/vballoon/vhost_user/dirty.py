# SPDX-License-Identifier: Apache-2.0
"""The dirty log that a front-end shares while it migrates the guest.

"Migration" of vhost-user.rst (QEMU 11.1.3): SET_LOG_BASE gives the log, SET_LOG_FD an event
descriptor to signal after the log has changed, and VHOST_F_LOG_ALL turns logging on.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fdsocket import close_fds
from vballoon.errors import ProtocolError
from vballoon.memory import BitmapLog
from virtio_formats.vhost_user import VhostFeature

if TYPE_CHECKING:
    from collections.abc import Callable

    from vballoon.memory import DirtyLog
    from vballoon.vhost_user.io import Io
    from vballoon.vhost_user.memtable import MemoryTable

__all__ = ("FrontendLog", "SharedLog")


class SharedLog:
    """Log memory that the front-end shares; the descriptor is owned."""

    def __init__(self, fd: int, size: int, offset: int) -> None:
        """Take *fd* over; raise :class:`~vballoon.errors.ProtocolError` ``log-region``."""
        self.fd, self.size, self.offset = fd, size, offset
        try:
            self.bitmap = BitmapLog.map(os.dup(fd), size, offset)
        except OSError as error:  # not an open descriptor: there is nothing to close
            raise ProtocolError("log-region", str(error)) from None
        except ProtocolError:
            close_fds([fd])
            raise

    def close(self) -> None:
        """Close the descriptor; the mapping lasts as long as it is used."""
        close_fds([self.fd])


class FrontendLog:
    """The log of the memory in *table*; owns the log's event descriptor."""

    def __init__(self, table: MemoryTable, io: Io) -> None:
        self._table, self._io = table, io
        self.area: SharedLog | None = None
        self.fd: int | None = None
        self._changed = False
        self._fds = 0  # how many event descriptors there have been

    @property
    def fd_key(self) -> tuple[str, int]:
        """What identifies the event descriptor in this process."""
        return "log", self._fds

    def set_area(self, area: SharedLog, features: int) -> None:
        """SET_LOG_BASE: log to *area*, taken over, from now on, if the *features* say so."""
        if self.area is not None:
            self.area.close()
        self.area = area
        self.apply(features)

    def set_fd(self, fd: int | None) -> None:
        """SET_LOG_FD: signal *fd* after changes; it is taken over."""
        if self.fd is not None:
            close_fds([self.fd])
        self.fd = fd
        self._fds += 1

    def apply(self, features: int) -> None:
        """Log writes if, and only if, LOG_ALL is in the acknowledged *features* and a log is set.

        Call this after each change of the memory table or of the features.
        """
        log: DirtyLog | None = None
        if self.area is not None and features & VhostFeature.LOG_ALL:
            log = _Noticing(self.area.bitmap, self._notice)
        self._table.memory.dirty_log = log

    def _notice(self) -> None:
        self._changed = True

    def announce(self) -> None:
        """Signal the front-end if the log has changed since the last call."""
        if self._changed and self.fd is not None:
            self._io.signal(self.fd)
        self._changed = False

    def close(self) -> None:
        """Close the descriptors."""
        self.set_fd(None)
        if self.area is not None:
            self.area.close()
            self.area = None


class _Noticing:
    """A dirty log that reports that it was written."""

    def __init__(self, inner: DirtyLog, notice: Callable[[], None]) -> None:
        self._inner, self._notice = inner, notice

    def mark(self, addr: int, length: int) -> None:
        """See :class:`~vballoon.memory.DirtyLog`."""
        self._inner.mark(addr, length)
        self._notice()
