# SPDX-License-Identifier: Apache-2.0
"""Provenance of bits, rounds, and what makes bits void.

A set bit is the promise "this page may be left out".  Who made the promise decides how long it
holds:

==========  =====================================================================================
ballooned   while the page is a hole of the backing file; without discarding, while the driver that
            inflated it is known to run
reported    while the page is a hole of the backing file
hinted      only together with writes tracked since before the round's command id was published,
            or verified on the stopped guest
walked      as hinted
==========  =====================================================================================

:data:`VOIDS` is the other half: what happens to a device, and whose bits do not survive it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from vballoon_spec.skipmap import LiveRoundState

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("VOIDS", "Instant", "Provenance", "Round", "RoundKind", "VoidReason")


class Provenance(StrEnum):
    """Who said that a page may be left out."""

    BALLOONED = "ballooned"
    REPORTED = "reported"
    HINTED = "hinted"
    WALKED = "walked"


class RoundKind(StrEnum):
    """What a round collects."""

    HINT = "hint"
    WALK = "walk"

    @property
    def provenance(self) -> Provenance:
        """Where the round's bits go."""
        return Provenance.HINTED if self is RoundKind.HINT else Provenance.WALKED


class VoidReason(StrEnum):
    """What ends rounds and voids bits."""

    RESET = "the device was reset"
    REBOOT = "the guest was rebooted"
    MEMORY_CHANGED = "the memory table changed"
    BACKEND_RESTARTED = "the backend was restarted"
    FRONTEND_LOST = "the front-end's connection was lost"


_HEARSAY = frozenset({Provenance.HINTED, Provenance.WALKED})

VOIDS: dict[VoidReason, frozenset[Provenance]] = {
    # A new driver starts with an empty balloon: the pages are the guest's again.  Reported pages
    # stay what they are, holes, until they are touched.
    VoidReason.RESET: _HEARSAY | {Provenance.BALLOONED},
    VoidReason.REBOOT: _HEARSAY | {Provenance.BALLOONED},
    # The same guest goes on; SkipMap.rebuilt keeps what regions that stay had in the balloon.
    VoidReason.MEMORY_CHANGED: _HEARSAY,
    # Nobody can tell what happened meanwhile, nor whether it is the same guest.
    VoidReason.BACKEND_RESTARTED: frozenset(Provenance),
    VoidReason.FRONTEND_LOST: frozenset(Provenance),
}


@dataclass(frozen=True, slots=True)
class Instant:
    """A moment on two clocks, in nanoseconds: CLOCK_MONOTONIC of this host, and UNIX time."""

    monotonic_ns: int
    wall_ns: int

    @classmethod
    def now(cls) -> Instant:
        """This moment."""
        return cls(time.monotonic_ns(), time.time_ns())


@dataclass(slots=True, eq=False)
class Round:
    """One hinting round or one walk.

    Make it *before* its id is published: ``published`` is the moment from which writes must have
    been tracked.  ``complete`` means that the guest told the end of the round and that nothing it
    sent had to be thrown away.
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
    """Why the round cannot be complete any more."""
    records: int = 0
    pages: int = 0
    """Pages of all records; one that was sent twice counts twice."""
    bad_records: int = 0
    changed: Callable[[Round], None] | None = field(default=None, repr=False)
    """Called whenever :attr:`state` may be another one."""

    def record(self, records: int, pages: int, bad: int = 0) -> None:
        """Account for a batch of *records* with *pages* pages; *bad* ones were thrown away."""
        self.last_record = Instant.now()
        if self.first_record is None:
            self.first_record = self.last_record
        self.records += records
        self.pages += pages
        self.bad_records += bad
        if bad:
            self.spoil("bad records")

    def spoil(self, why: str) -> None:
        """The round goes on, but can no longer end complete."""
        if self.spoilt is None:
            self.spoilt = why

    def end(self, *, complete: bool = True) -> None:
        """The round is over; *complete* when the guest said that this was all."""
        if self.ended is None:
            self.ended = Instant.now()
            self.complete = complete and self.spoilt is None
            self._tell()

    def void(self, reason: str) -> None:
        """The round and its bits are worth nothing any more; the first reason is kept."""
        if self.void_reason is None:
            self.void_reason = str(reason)
            self.ended = self.ended or Instant.now()
            self._tell()

    @property
    def state(self) -> LiveRoundState:
        """Where the round stands."""
        if self.void_reason is not None:
            return LiveRoundState.VOID
        if self.ended is None:
            return LiveRoundState.RUNNING
        return LiveRoundState.COMPLETE if self.complete else LiveRoundState.INCOMPLETE

    def as_dict(self) -> dict[str, Any]:
        """The round as ``query-round`` shows it; times in nanoseconds."""
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
