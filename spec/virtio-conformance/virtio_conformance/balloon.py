# SPDX-License-Identifier: Apache-2.0
"""Helpers of the tests of memory balloons: pages to inflate, and checks of their contents."""

from __future__ import annotations

import struct
from typing import Any

from virtio_conformance.findings import not_applicable, require
from virtio_conformance.memory import PAGE
from virtio_conformance.profiles import Exchange
from virtio_conformance.rig import Placed, Rig
from virtio_conformance.ring import Segment
from virtio_formats.virtio.balloon import BalloonFeature

__all__ = (
    "DEFLATE",
    "INFLATE",
    "bring_up",
    "expect_freed",
    "inflate",
    "no_bytes",
    "pages",
    "pfns",
    "report",
)

F = BalloonFeature
INFLATE, DEFLATE = 0, 1


def pages(rig: Rig, count: int, region: int = 1) -> int:
    """Return the address of *count* new pages of guest memory, which hold data."""
    start = rig.ram.alloc(count * PAGE, PAGE, region)
    require(not rig.ram.is_hole(start), "the suite's memory has holes")
    return start


def pfns(*addresses: int) -> bytes:
    """Return an inflate or deflate buffer that names the pages at *addresses*."""
    return b"".join(struct.pack("<I", address // PAGE) for address in addresses)


def freed(rig: Rig, start: int, count: int) -> list[int]:
    """Return which of *count* pages are holes, as indices."""
    return [i for i in range(count) if rig.ram.is_hole(start + i * PAGE)]


def expect_freed(rig: Rig, start: int, count: int, *, reported: bool = False) -> None:
    """Raise a finding unless all of these pages are holes (with discards off: none of them).

    A device need not free pages.  If this one is known to free them, a page that it keeps was not
    handled, and the finding names the row of the test.  Otherwise it names the advisory row.
    """
    advisory = "balloon.report.frees" if reported else "balloon.inflate.frees"
    row = "" if (rig.frees_reports if reported else rig.frees) else advisory
    due = list(range(count)) if rig.discards else []
    found = freed(rig, start, count)
    missing, surplus = sorted(set(due) - set(found)), sorted(set(found) - set(due))
    told = f"{len(missing)} of {count} pages still hold memory, e.g. {missing[:3]}"
    require(not missing, told, row=row)
    require(not surplus, f"pages were freed although discards are off: {surplus[:3]}", row=row)


def inflate(rig: Rig, data: bytes, spans: list[tuple[int, int]], *, queue: int = INFLATE) -> None:
    """Put one buffer of page numbers through; only *spans* may change, and the used length is 0."""
    exchange = Exchange(data, verify=no_bytes, may_change=tuple(spans))
    rig.run([exchange], queue=queue)


def no_bytes(used: int, data: bytes) -> str:
    """Return what is wrong with the used length of a buffer that the device must not write to."""
    return f"used length {used} for a buffer that nothing is written to" if used else ""


def bring_up(rig: Rig, features: int, numbers: dict[str, int], **how: Any) -> None:
    """Bring up a balloon with optional features and their rings."""
    if features & ~rig.offered:
        not_applicable(f"features {features & ~rig.offered:#x} are not offered")
    rig.bring_up(extra=features, queues=[0, 1, *numbers.values()], **how)


def report(
    rig: Rig, queue: int, start: int, size: int, may: tuple[int, int] | None = None
) -> Placed:
    """Report one free range, whose memory is the buffer itself."""
    exchange = Exchange(b"", 0, may_change=(may or (start, start + size),))
    placed = Placed(exchange, [Segment(start, size, True)])
    rig.submit(placed, queue=queue)
    placed.exchange.writable = size
    placed.writable_at = start
    before = rig.ram.picture()
    rig.rings[queue].publish()
    rig.kick(queue)
    (used,) = rig.collect(rig.rings[queue], 1)
    told = f"used length {used.len} for a range of {size} bytes"
    require(used.len <= size, told, row="split.used.len-written")
    span = may or (start, start + size)
    placed.segments = []
    rig.ram.expect_untouched(before, [*rig.allowed(), span])
    return placed
