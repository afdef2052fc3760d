# SPDX-License-Identifier: Apache-2.0
"""Command ids: how the device asks the driver for a round, and knows which answers belong to it.

*Memory Balloon Device / Device Operation / Free Page Hinting*; the walk extension uses the same
rules.  A round goes ::

    IDLE ──start──▶ PUBLISHED ──driver echoes the id──▶ RUNNING ──driver's stop/end──▶ ENDED
      ▲                 │                                  │                             │
      └───────── stop, reset, lost connection (void) ◀─────┴─────────────────────────────┘

Records are taken in RUNNING only.  ENDED does not go back to RUNNING when a driver repeats the id.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from vballoon.skipmap import Round
from virtio_formats.virtio.balloon import CMD_ID_DONE, CMD_ID_FIRST, CMD_ID_STOP

if TYPE_CHECKING:
    from collections.abc import Callable

    from vballoon.skipmap import RoundKind

__all__ = ("CommandRounds", "CommandState")

_ID_MAX = 0xFFFF_FFFF


class CommandState(Enum):
    """The state of a round."""

    IDLE = "idle"
    PUBLISHED = "published"
    RUNNING = "running"
    ENDED = "ended"


class CommandRounds:
    """The rounds of one kind, one after the other.

    *begin* is called with a round before its id is published; *publish* puts a command id into the
    configuration space and notifies the driver; *ended* is called with every round that has ended,
    complete or void.
    """

    def __init__(
        self,
        kind: RoundKind,
        *,
        begin: Callable[[Round], None],
        publish: Callable[[int], None],
        ended: Callable[[Round], None],
    ) -> None:
        self.state = CommandState.IDLE
        self.round: Round | None = None
        """The latest round, also after it ended."""
        self.next_id = CMD_ID_FIRST
        self._kind = kind
        self._begin = begin
        self._publish = publish
        self._ended = ended
        self._unanswered: set[int] = set()
        self._hold = False

    def start(self, *, hold: bool = False) -> Round:
        """Begin a round under a new id; one that is still going becomes void.

        With *hold* the driver keeps its free pages back until :meth:`stop`; otherwise they are
        released (``CMD_ID_DONE``) as soon as the round has ended.
        """
        self.void("superseded by a newer round")
        self.round = Round(id=self._new_id(), kind=self._kind)
        self._hold = hold
        self._unanswered.add(self.round.id)
        self._begin(self.round)  # its bits start empty, its time is taken before anyone can answer
        self.state = CommandState.PUBLISHED
        self._publish(self.round.id)
        return self.round

    def stop(self) -> None:
        """End the round, if one is going, and let the driver have its pages back."""
        self.void("stopped by the operator")
        self._publish(CMD_ID_DONE)

    def echoed(self, cmd_id: int) -> bool:
        """Handle the driver's command id *cmd_id* and return whether records may follow."""
        current = self.round is not None and cmd_id == self.round.id
        if current and self.state is CommandState.PUBLISHED:
            self.state = CommandState.RUNNING
            return True
        return current and self.state is CommandState.RUNNING

    def driver_stopped(self) -> None:
        """Handle STOP (or END) of the driver: ids may be reused, and a running round ends."""
        self._unanswered.clear()
        if self.state is CommandState.RUNNING and self.round is not None:
            self.state = CommandState.ENDED
            self.round.end()
            self._ended(self.round)
            if not self._hold:
                self._publish(CMD_ID_DONE)

    def void(self, reason: str) -> None:
        """Void the round and its bits unless it has ended."""
        if self.round is not None and self.state in (CommandState.PUBLISHED, CommandState.RUNNING):
            self.round.void(reason)
            self._ended(self.round)
        self.state = CommandState.IDLE

    def reset(self, reason: str) -> None:
        """Reset, reboot, another memory table, a lost connection: also an ended round is void."""
        self.void(reason)
        if self.round is not None:
            self.round.void(reason)
        self._unanswered.clear()

    @property
    def running(self) -> bool:
        """Whether records of the driver are to be taken."""
        return self.state is CommandState.RUNNING

    def _new_id(self) -> int:
        """Return an id that is neither reserved nor unanswered; a device must not reuse those."""
        while self.next_id in self._unanswered or self.next_id in (CMD_ID_STOP, CMD_ID_DONE):
            self.next_id = self._after(self.next_id)
        chosen, self.next_id = self.next_id, self._after(self.next_id)
        return chosen

    @staticmethod
    def _after(cmd_id: int) -> int:
        return cmd_id + 1 if cmd_id < _ID_MAX else CMD_ID_FIRST
