# SPDX-License-Identifier: Apache-2.0
"""Which numbers a balloon gives its optional queues; found out once and used everywhere.

The standard fixes statsq 2, free_page_vq 3 and reporting_vq 4.  Linux numbers the queues of the
negotiated features densely, and there are devices that number those of the *offered* features.
All of them exist, so the tests follow the device, and one advisory row reports what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from virtio_conformance.findings import Finding
from virtio_conformance.memory import PAGE
from virtio_conformance.profiles import Exchange
from virtio_conformance.rig import Placed, Rig
from virtio_conformance.ring import Segment
from virtio_formats.virtio.balloon import BalloonCmdId, BalloonFeature

__all__ = ("OPTIONAL", "SCHEMES", "Numbering", "find_numbering")

F = BalloonFeature
OPTIONAL = {"stats": F.STATS_VQ, "hint": F.FREE_PAGE_HINT, "report": F.PAGE_REPORTING}
"""Role of each optional queue and its feature, in the standard's order."""
FIXED = {"stats": 2, "hint": 3, "report": 4}
LIMIT = 1.0
"""Seconds that a device gets to serve a queue under a number that it may not know."""


def _dense(features: int) -> dict[str, int]:
    present = [role for role, bit in OPTIONAL.items() if features & bit]
    return {role: 2 + place for place, role in enumerate(present)}


SCHEMES: dict[str, Callable[[int, int], dict[str, int]]] = {
    "dense": lambda features, offered: _dense(features),
    "fixed": lambda features, offered: FIXED,
    "offered": lambda features, offered: _dense(offered),
}
"""Name → a function of negotiated and offered features that returns the number of each role."""


@dataclass(frozen=True)
class Numbering:
    """The schemes that a device serves, the one that the tests use first."""

    schemes: tuple[str, ...] = ("fixed",)
    found: bool = False
    """Whether the device showed it; else the standard's numbers are assumed."""
    frees: bool = False
    """Whether a reported page became a hole."""

    def numbers(self, features: int, offered: int, scheme: str = "") -> dict[str, int]:
        """Return the queue number of each optional role that *features* has."""
        places = SCHEMES[scheme or self.schemes[0]](features, offered)
        return {role: places[role] for role, bit in OPTIONAL.items() if features & bit}

    def __str__(self) -> str:
        if not self.found:
            return "the numbering of the optional queues did not show; the standard's is assumed"
        words = {
            "dense": "densely by negotiated features, as Linux does",
            "fixed": "as the standard does",
            "offered": "by offered features",
        }
        return f"the optional queues are numbered {' and '.join(words[s] for s in self.schemes)}"


def find_numbering(new_rig: Callable[[], Rig]) -> Numbering:
    """Try the numbers that tell the schemes apart, each on a connection of its own."""
    rig = new_rig()
    offered = rig.offered
    rig.leave()
    role = next((name for name in ("report", "hint") if offered & OPTIONAL[name]), "")
    if not role:  # statistics are queue 2 in each scheme
        return Numbering()
    feature = int(OPTIONAL[role])
    places = {name: how(feature, offered)[role] for name, how in SCHEMES.items()}
    results = {number: _try(new_rig(), role, number) for number in sorted(set(places.values()))}
    best = max(results.values())
    if not best:
        return Numbering()
    served = {number: name for name, number in reversed(places.items()) if results[number] == best}
    schemes = tuple(name for name in SCHEMES if name in served.values())
    return Numbering(schemes, found=True, frees=best > 1)


def _try(rig: Rig, role: str, number: int) -> int:
    """Return 0 if the queue is not served under *number*, 1 if it is, 2 if it freed memory."""
    try:
        rig.bring_up(extra=int(OPTIONAL[role]), queues=[0, 1, number])
        start = rig.ram.alloc(PAGE, PAGE, 1)
        segments = [Segment(start, PAGE, True)]
        if role == "hint":
            command = rig.place(Exchange(BalloonCmdId(cmd_id=0).build()))
            segments = command.segments
        rig.submit(Placed(Exchange(b""), segments), queue=number)
        rig.rings[number].publish()
        rig.kick(number)
        rig.collect(rig.rings[number], 1, LIMIT)
        return 2 if rig.ram.is_hole(start) else 1
    except Finding:
        return 0
    finally:
        rig.leave()
