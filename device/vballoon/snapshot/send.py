# SPDX-License-Identifier: Apache-2.0
"""The source's side of a move, over a link."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vballoon.errors import UsageError
from vballoon.snapshot.link import LinkLost
from vballoon.snapshot.move import Source, SourceInput, source
from vballoon_spec.snapshot import FrameKind

if TYPE_CHECKING:
    from vballoon.snapshot.link import Link
    from vballoon.snapshot.pipe import MoveStore

__all__ = ("Sender",)

_INPUTS = {
    FrameKind.VERIFIED: SourceInput.VERIFIED,
    FrameKind.RUNNING: SourceInput.RUNNING,
    FrameKind.REFUSED: SourceInput.REFUSED,
}


class Sender:
    """Follows the source's state table; *store* writes the snapshot to *link*."""

    def __init__(self, link: Link, store: MoveStore) -> None:
        self.state = Source.SENDING
        self._link, self._store = link, store
        self._why = ""

    def wait_verified(self) -> None:
        """Wait for VERIFIED. Raise UsageError if the destination will not have the machine."""
        self.state = source(self.state, SourceInput.SENT)
        self._receive()
        if self.state is not Source.ACCEPTED:
            raise UsageError(f"the machine was not moved: {self._why}")

    def commit(self) -> None:
        """Send COMMIT and wait for RUNNING. Raise UsageError if it may or may not run there."""
        self._take(SourceInput.NOTED, "")
        try:
            self._link.send(FrameKind.COMMIT, self._store.digest)
        except LinkLost as error:  # some of it may have arrived
            self._take(SourceInput.LOST, str(error))
        else:
            self._receive()
        state: Source = self.state
        if state is not Source.DONE:
            raise UsageError(f"not known whether the machine runs elsewhere: {self._why}")

    def abort(self) -> None:
        """Send ABORT: the guest is resumed here, and COMMIT will never be sent."""
        self.state = Source.ABORTED
        with contextlib.suppress(LinkLost):
            self._link.send(FrameKind.ABORT, self._store.digest)

    def _receive(self) -> None:
        try:
            kind, body = self._link.receive()
        except LinkLost as error:
            self._take(SourceInput.LOST, str(error))
            return
        event = _INPUTS.get(FrameKind(kind)) if kind in set(FrameKind) else None
        if event is SourceInput.REFUSED:
            self._take(event, f"the destination reports: {body.decode(errors='replace')}")
        elif event is None or body != self._store.digest:
            self._take(SourceInput.LOST, f"unsolicited message {kind}")
        else:
            self._take(event, f"unsolicited message {kind}")

    def _take(self, event: SourceInput, why: str) -> None:
        self.state, self._why = source(self.state, event), why
