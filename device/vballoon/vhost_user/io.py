# SPDX-License-Identifier: Apache-2.0
"""The interface of the shell that runs the back-end: events in, signals out, no policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vballoon.vhost_user.channel import BackendChannel

__all__ = ("ChannelIo", "Handle", "Io")


class Handle(Protocol):
    """Something under way that can be called off."""

    def cancel(self) -> None:
        """Call it off and close its descriptor; safe to call again."""


class ChannelIo(Protocol):
    """The socket of the back-end channel."""

    def fileno(self) -> int:
        """Return the descriptor of the socket, which stays the channel's."""

    def flush(self) -> None:
        """Send what the channel has to send."""

    def cancel(self) -> None:
        """Close the socket; safe to call again."""


class Io(Protocol):
    """The shell.  None of these calls blocks."""

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever the event descriptor *fd* was signalled (and has been read).

        Raises :class:`OSError` for a descriptor that cannot be watched.  *fd* stays the caller's.
        """

    def unwatch(self, fd: int) -> None:
        """Stop watching; an *fd* that is not watched is passed over."""

    def prepare(self, fd: int) -> None:
        """Make *fd* fit for :meth:`signal`; :class:`OSError` if it is no event descriptor."""

    def signal(self, fd: int) -> None:
        """Signal the event descriptor *fd*; what cannot be delivered is dropped."""

    def soon(self, callback: Callable[[], None]) -> None:
        """Call back once, after whatever else is ready now."""

    def every(self, seconds: float, callback: Callable[[], None]) -> Handle:
        """Call back at this interval until called off."""

    def open_channel(self, fd: int, channel: BackendChannel) -> ChannelIo:
        """Serve *channel* on socket *fd*, which is taken over; :class:`OSError` if it is none."""

    def write_all(self, fd: int, data: bytes, done: Callable[[str], None]) -> Handle:
        """Write *data*, close *fd* (taken over), then report: ``""`` or what went wrong."""

    def read_all(self, fd: int, limit: int, done: Callable[[bytes, str], None]) -> Handle:
        """Read until the end of file, close *fd* (taken over), then report data and trouble."""

    def output(self) -> None:
        """Handle output of the session that no incoming message caused."""
