# SPDX-License-Identifier: Apache-2.0
"""The events of a transport; both transports report the same."""

from __future__ import annotations

__all__ = ("TransportEvents",)


class TransportEvents:
    """Receives the events of a transport.  Every method does nothing; override those you need."""

    def frontend_connected(self) -> None:
        """Handle a front-end that has connected."""

    def frontend_disconnected(self, reason: str) -> None:
        """Handle the end of a connection.

        *reason* is ``""`` when the front-end closed the connection between two messages, else why
        the connection ended.
        """

    def queue_broken(self, index: int, rule: str, detail: str) -> None:
        """Handle queue *index*, which was stopped because the driver broke *rule*."""
