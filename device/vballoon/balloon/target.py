# SPDX-License-Identifier: Apache-2.0
"""Which targets the balloon accepts, without I/O and without state.

A target is the memory in bytes that the guest should have.  Everything in the front-end's memory
table is mapped, but not everything is the guest's to use: a virtio-mem region counts whole, plugged
or not, and an ivshmem window is no RAM.  So the guest's size comes from the operator, or from the
guest's statistics where they contradict the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from vballoon.errors import UsageError
from vballoon.sizes import VALUE_MIN, Limits, size_text

__all__ = ("Guest", "check", "floor", "inherited", "size")

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Guest:
    """What is known of a guest, in bytes; None: not reported.  The guest may report anything."""

    mapped: int
    """Size of the front-end's memory table."""
    total: int | None = None
    """``stat-total-memory``."""
    available: int | None = None
    """``stat-available-memory``, or ``stat-free-memory`` where it is missing."""
    ballooned: int = 0
    """Size of the balloon when the statistics arrived."""
    total_has_balloon: bool = False
    """The total includes the balloon.  Linux leaves it out unless DEFLATE_ON_OOM is negotiated."""

    @property
    def seen(self) -> int | None:
        """The memory that the guest's kernel manages, the balloon included."""
        if not self.total:
            return None
        return min(self.mapped, self.total + (0 if self.total_has_balloon else self.ballooned))


def size(guest: Guest, limits: Limits) -> int:
    """Return the guest's memory in bytes, the balloon included.

    A kernel keeps some memory for itself (page structures, a crash kernel's reservation) that
    its total leaves out.  Only what is missing beyond that is not the guest's.
    """
    if limits.memory is not None:
        return min(limits.memory, guest.mapped)
    seen = guest.seen
    return guest.mapped if seen is None or seen + _reserve(guest.mapped) >= guest.mapped else seen


def floor(guest: Guest, limits: Limits) -> int:
    """Return the target in bytes that leaves the guest what it uses, plus a margin.

    The operator's minimum replaces it.  Without statistics it is a quarter of the guest's size.
    """
    whole = size(guest, limits)
    if limits.minimum is not None:
        return min(limits.minimum, whole)
    if guest.available is None:
        return whole // 4
    return min(whole, max(0, whole - _room(guest)))


def check(value: int, guest: Guest, limits: Limits, *, now: int) -> None:
    """Raise UsageError if *value* is no target for *guest*, with what to do instead.

    *now* is the smaller of the guest's target and its size without the balloon, in bytes: a
    target that is not below it takes no memory away, so the floor does not apply.
    """
    if value < VALUE_MIN:
        raise UsageError(
            f"the target is in bytes, and {value} is less than 1 MiB; did you mean {value}M?"
        )
    ceiling = limits.maximum or limits.memory or guest.mapped
    if value > ceiling:
        what = "the maximum of this machine" if limits.maximum else "the guest's memory"
        raise UsageError(f"the target {size_text(value)} is above {what}, {size_text(ceiling)}")
    lowest = floor(guest, limits)
    if value < min(lowest, now):
        why = (
            "the minimum of this machine"
            if limits.minimum is not None
            else "what the guest uses plus a margin"
            if guest.available is not None
            else "a quarter of the guest's memory, which has reported no statistics"
        )
        raise UsageError(
            f"the target {size_text(value)} is below {size_text(lowest)}, {why}; "
            "force=true sets it all the same"
        )


def inherited(wanted: int, assumed: int, guest: Guest) -> int:
    """Return the size in bytes that the balloon may have in a driver that has just started.

    It is *wanted*, set for a guest of *assumed* bytes, unless the driver reports far less memory,
    as a crash kernel does.  Then it is at most what that guest can spare.
    """
    seen = guest.seen
    if seen is None or seen + _reserve(assumed) >= assumed:
        return wanted
    return min(wanted, _room(guest))


def _reserve(memory: int) -> int:
    """Return how much of *memory* bytes a kernel may keep out of its total."""
    return memory // 8 + 128 * _MIB


def _room(guest: Guest) -> int:
    """Return how large the balloon may become, in bytes, by the guest's statistics."""
    margin = max(32 * _MIB, (guest.seen or guest.mapped) // 32)
    return max(0, guest.ballooned + (guest.available or 0) - margin)
