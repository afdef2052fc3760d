# SPDX-License-Identifier: Apache-2.0
"""The commit protocol of a move: two state tables, without I/O.

The source sends the whole snapshot.  The destination checks it, has it on its own disk, and answers
VERIFIED.  The source writes *gone* into its journal: from then on neither it nor its guardian
resumes the guest.  Then it sends COMMIT.  The destination runs the guest only on COMMIT, and
answers RUNNING; only then does the source end QEMU.  Before *gone* a lost link means that the guest
runs on at the source.  After it, both sides stay stopped until an operator decides.

Every message carries the SHA-256 of the manifest, so that it cannot belong to another move.
The model is ``vballoon_spec/safety/move.pml``.
"""

from __future__ import annotations

from enum import Enum

__all__ = ("Destination", "DestinationInput", "Source", "SourceInput", "destination", "source")


class Source(Enum):
    """States of the source. The guest is stopped in all but ABORTED."""

    SENDING = "sending"
    """The snapshot is being sent."""
    OFFERED = "offered"
    """All is sent; the destination checks it."""
    ACCEPTED = "accepted"
    """The destination has it; nothing is decided yet."""
    GONE = "gone"
    """*gone* is in the journal, and COMMIT is sent or about to be."""
    DONE = "done"
    """The guest runs at the destination: end QEMU."""
    ABORTED = "aborted"
    """The destination will not run the guest: resume it here."""
    UNDECIDED = "undecided"
    """The guest may run at the destination: leave it stopped, and print instructions."""


class SourceInput(Enum):
    """What happens to the source."""

    SENT = "sent"
    VERIFIED = "verified"
    NOTED = "noted"
    """*gone* was written into the journal."""
    RUNNING = "running"
    REFUSED = "refused"
    """The destination reports that it will not run the guest by itself."""
    LOST = "lost"
    """The link ended, timed out, or carried anything that is not in the table."""


_SOURCE = {
    (Source.SENDING, SourceInput.SENT): Source.OFFERED,
    (Source.SENDING, SourceInput.REFUSED): Source.ABORTED,
    (Source.SENDING, SourceInput.LOST): Source.ABORTED,
    (Source.OFFERED, SourceInput.VERIFIED): Source.ACCEPTED,
    (Source.OFFERED, SourceInput.REFUSED): Source.ABORTED,
    (Source.OFFERED, SourceInput.LOST): Source.ABORTED,
    (Source.ACCEPTED, SourceInput.NOTED): Source.GONE,
    (Source.ACCEPTED, SourceInput.LOST): Source.ABORTED,
    (Source.GONE, SourceInput.RUNNING): Source.DONE,
    (Source.GONE, SourceInput.REFUSED): Source.UNDECIDED,
    (Source.GONE, SourceInput.LOST): Source.UNDECIDED,
}


class Destination(Enum):
    """States of the destination. The guest runs only in COMMITTED and RUNNING."""

    RECEIVING = "receiving"
    """The snapshot is being received."""
    VERIFIED = "verified"
    """It is complete, checked and on disk; VERIFIED is sent or about to be."""
    COMMITTED = "committed"
    """COMMIT has come: start the guest."""
    RUNNING = "running"
    """The guest runs; RUNNING is sent or about to be."""
    DROPPED = "dropped"
    """There is no snapshot here, or it is not needed: remove what was received."""
    UNDECIDED = "undecided"
    """The guest may run at the source: keep the snapshot, do not run it, print instructions."""
    FAILED = "failed"
    """The guest could not be started: keep the snapshot, print instructions."""


class DestinationInput(Enum):
    """What happens to the destination."""

    COMPLETE = "complete"
    COMMIT = "commit"
    ABORT = "abort"
    """The source reports that it resumes the guest, and will never send COMMIT."""
    STARTED = "started"
    BROKEN = "broken"
    """The snapshot is not whole, or QEMU does not start."""
    LOST = "lost"
    """The link ended, timed out, or carried anything that is not in the table."""


_DESTINATION = {
    (Destination.RECEIVING, DestinationInput.COMPLETE): Destination.VERIFIED,
    (Destination.RECEIVING, DestinationInput.BROKEN): Destination.DROPPED,
    (Destination.RECEIVING, DestinationInput.LOST): Destination.DROPPED,
    (Destination.VERIFIED, DestinationInput.COMMIT): Destination.COMMITTED,
    (Destination.VERIFIED, DestinationInput.ABORT): Destination.DROPPED,
    (Destination.VERIFIED, DestinationInput.LOST): Destination.UNDECIDED,
    (Destination.COMMITTED, DestinationInput.STARTED): Destination.RUNNING,
    (Destination.COMMITTED, DestinationInput.BROKEN): Destination.FAILED,
    (Destination.COMMITTED, DestinationInput.LOST): Destination.COMMITTED,
    (Destination.RUNNING, DestinationInput.LOST): Destination.RUNNING,
}


def source(state: Source, event: SourceInput) -> Source:
    """Return the source's state after *event*. What is not in the table counts as LOST."""
    lost = _SOURCE.get((state, SourceInput.LOST), state)
    return _SOURCE.get((state, event), lost)


def destination(state: Destination, event: DestinationInput) -> Destination:
    """Return the destination's state after *event*. What is not in the table counts as LOST."""
    lost = _DESTINATION.get((state, DestinationInput.LOST), state)
    return _DESTINATION.get((state, event), lost)
