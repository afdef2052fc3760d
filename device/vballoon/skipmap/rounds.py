# SPDX-License-Identifier: Apache-2.0
"""Provenance of bits, rounds, and what makes bits void.

A set bit is the promise "this page may be left out".  Its provenance decides how long it is valid:

==========  =====================================================================================
ballooned   while the page is a hole of the backing file; without discarding, while the driver that
            inflated it is known to run
reported    while the page is a hole of the backing file
hinted      only together with writes tracked since before the round's command id was published,
            or verified on the stopped guest
walked      as hinted
==========  =====================================================================================

:data:`VOIDS` lists the events that void bits, with the provenances that do not survive each.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from vballoon_spec.skipmap import LiveRoundState

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("VOIDS", "Instant", "Provenance", "Round", "RoundKind", "RoundState", "VoidReason")


class Provenance(StrEnum):
    """The source of the information that a page may be left out."""

    BALLOONED = "ballooned"
    REPORTED = "reported"
    HINTED = "hinted"
    WALKED = "walked"


class RoundKind(StrEnum):
    """The kind of a round."""

    HINT = "hint"
    WALK = "walk"

    @property
    def provenance(self) -> Provenance:
        """The provenance of the round's bits."""
        return Provenance.HINTED if self is RoundKind.HINT else Provenance.WALKED


class VoidReason(StrEnum):
    """The events that end rounds and void bits."""

    RESET = "the device was reset"
    REBOOT = "the guest was rebooted"
    MEMORY_CHANGED = "the memory table changed"
    BACKEND_RESTARTED = "the back-end was restarted"
    FRONTEND_LOST = "the front-end's connection was lost"


_HEARSAY = frozenset({Provenance.HINTED, Provenance.WALKED})

VOIDS: dict[VoidReason, frozenset[Provenance]] = {
    # A new driver starts with an empty balloon, so inflated pages are in use again.  Reported pages
    # stay what they are, holes, until they are touched.
    VoidReason.RESET: _HEARSAY | {Provenance.BALLOONED},
    VoidReason.REBOOT: _HEARSAY | {Provenance.BALLOONED},
    # The same guest continues; SkipMap.rebuilt keeps the ballooned pages of regions that stay.
    VoidReason.MEMORY_CHANGED: _HEARSAY,
    # It is unknown what happened meanwhile, and whether it is the same guest.
    VoidReason.BACKEND_RESTARTED: frozenset(Provenance),
    VoidReason.FRONTEND_LOST: frozenset(Provenance),
}


@dataclass(frozen=True, slots=True)
class Instant:
    """A time on two clocks in nanoseconds: CLOCK_MONOTONIC of this host, and UNIX time."""

    monotonic_ns: int
    wall_ns: int

    @classmethod
    def now(cls) -> Instant:
        """Return the current time."""
        return cls(time.monotonic_ns(), time.time_ns())


@dataclass(frozen=True, slots=True)
class RoundState:
    """What is kept of a round when its process ends: the round is void then."""

    id: int
    kind: RoundKind
    published: Instant
    records: int
    pages: int
    bad_records: int


@dataclass(slots=True, eq=False)
class Round:
    """One hinting round or one walk.

    Make it *before* its id is published: ``published`` is the moment from which writes must have
    been tracked.  ``complete`` means that the guest sent the end of the round and that none of its
    records was ignored.
    """

    id: int
    kind: RoundKind
    published: Instant = field(default_factory=Instant.now)
    first_record: Instant | None = None
    last_record: Instant | None = None
    ended: Instant | None = None
    complete: bool = False
    void_reason: str | None = None
    spoilt: str | None = None
    """The reason why the round can no longer be complete."""
    records: int = 0
    pages: int = 0
    """Number of pages of all records; a page that was sent twice counts twice."""
    bad_records: int = 0
    changed: Callable[[Round], None] | None = field(default=None, repr=False)
    """Called whenever :attr:`state` may have changed."""

    def record(self, records: int, pages: int, bad: int = 0) -> None:
        """Count a batch of *records* with *pages* pages, and *bad* ignored records."""
        self.last_record = Instant.now()
        if self.first_record is None:
            self.first_record = self.last_record
        self.records += records
        self.pages += pages
        self.bad_records += bad
        if bad:
            self.spoil("bad records")

    def spoil(self, why: str) -> None:
        """Record why the round can no longer end complete; it continues."""
        if self.spoilt is None:
            self.spoilt = why

    def end(self, *, complete: bool = True) -> None:
        """End the round; *complete* says whether the guest has sent all records."""
        if self.ended is None:
            self.ended = Instant.now()
            self.complete = complete and self.spoilt is None
            self._tell()

    def void(self, reason: str) -> None:
        """Void the round and its bits; the first reason is kept."""
        if self.void_reason is None:
            self.void_reason = str(reason)
            self.ended = self.ended or Instant.now()
            self._tell()

    @property
    def state(self) -> LiveRoundState:
        """The state of the round."""
        if self.void_reason is not None:
            return LiveRoundState.VOID
        if self.ended is None:
            return LiveRoundState.RUNNING
        return LiveRoundState.COMPLETE if self.complete else LiveRoundState.INCOMPLETE

    def as_dict(self) -> dict[str, Any]:
        """Return the round in the form of ``query-round``, with times in nanoseconds."""
        times = {
            name: None if at is None else {"monotonic-ns": at.monotonic_ns, "wall-ns": at.wall_ns}
            for name, at in (
                ("published", self.published),
                ("first-record", self.first_record),
                ("last-record", self.last_record),
                ("ended", self.ended),
            )
        }
        return {
            "round": self.id,
            "kind": self.kind.value,
            "state": self.state.name.lower(),
            "complete": self.state is LiveRoundState.COMPLETE,
            "void-reason": self.void_reason,
            "spoilt": self.spoilt,
            **times,
            "records": self.records,
            "pages": self.pages,
            "bad-records": self.bad_records,
        }

    def _tell(self) -> None:
        if self.changed is not None:
            self.changed(self)
