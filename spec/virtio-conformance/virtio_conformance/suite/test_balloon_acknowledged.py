# SPDX-License-Identifier: Apache-2.0
"""After the acknowledgement a page is the driver's again: a late discard loses its data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from virtio_conformance.balloon import DEFLATE, INFLATE, bring_up, pages, pfns
from virtio_conformance.findings import not_applicable, require
from virtio_conformance.memory import PAGE
from virtio_conformance.numbering import Numbering
from virtio_conformance.profiles import Exchange
from virtio_conformance.rig import Placed, Rig
from virtio_conformance.ring import Segment
from virtio_formats.virtio.balloon import BalloonFeature

F = BalloonFeature
ROUNDS = 60
"""A late discard loses its race only now and then: the write has to hit its window."""
ENOUGH = 4.0
"""Seconds after which a slow machine stops trying; no verdict depends on it."""
PAGES = 256
"""Pages of one request: every second one of a range, so that each is a discard of its own."""
MARK = b"the driver's again"
SPINS = 2_000_000


@pytest.fixture(autouse=True)
def only_balloons(profile: Any) -> None:
    """Skip these tests for other device types."""
    if profile.name != "balloon":
        not_applicable("for memory balloons")


def rounds() -> Iterator[int]:
    """Count the rounds."""
    deadline = time.monotonic() + ENOUGH
    for turn in range(ROUNDS):
        if time.monotonic() > deadline:
            return
        yield turn


def write_at_once(rig: Rig, queue: int, chosen: list[int]) -> None:
    """Busy-wait until every buffer is used, and write to every page, the last one first."""
    ring = rig.rings[queue]
    due = ring.outstanding
    for _ in range(SPINS):
        if ring.used_count() >= due:
            break
    rig.collect(ring, due)
    for page in reversed(chosen):
        rig.ram.write(page, MARK)


def expect_kept(rig: Rig, chosen: list[int], turn: int) -> None:
    """Raise a finding unless every page still holds what was written after the acknowledgement."""
    rig.main_quiet(0.02)
    lost = [page for page in chosen if rig.ram.read(page, len(MARK)) != MARK]
    told = f"turn {turn}: {len(lost)} pages lost what was written after the acknowledgement"
    require(not lost, f"{told}, e.g. {lost[:1]}")


@pytest.mark.requirement("balloon.inflate.acknowledged")
def test_inflated_pages_after_the_acknowledgement(split_rig: Rig) -> None:
    """Pages taken back as soon as their inflate request is used keep what is written to them."""
    rig = split_rig
    rig.bring_up()
    start = pages(rig, 2 * PAGES)
    chosen = [start + 2 * i * PAGE for i in range(PAGES)]
    data = pfns(*chosen)
    for turn in rounds():
        for page in chosen:
            rig.ram.write(page, b"full")
        back = rig.submit(rig.place(Exchange(data)), queue=DEFLATE)
        rig.submit(rig.place(Exchange(data)), queue=INFLATE)
        rig.rings[INFLATE].publish()
        rig.kick(INFLATE)
        write_at_once(rig, INFLATE, chosen)
        rig.rings[DEFLATE].publish()  # without MUST_TELL_HOST it may come after the first use
        rig.kick(DEFLATE)
        rig.check([back], rig.collect(rig.rings[DEFLATE], 1))
        expect_kept(rig, chosen, turn)


@pytest.mark.requirement("balloon.report.acknowledged")
def test_reported_pages_after_the_acknowledgement(split_rig: Rig, numbering: Numbering) -> None:
    """Pages used again as soon as their report is acknowledged keep what is written to them."""
    rig = split_rig
    numbers = numbering.numbers(F.PAGE_REPORTING, rig.offered)
    if "report" not in numbers:
        not_applicable("reporting is not offered")
    bring_up(rig, F.PAGE_REPORTING, numbers, size=PAGES)
    queue = numbers["report"]
    start = pages(rig, 2 * PAGES)
    chosen = [start + 2 * i * PAGE for i in range(PAGES)]
    for turn in rounds():
        for page in chosen:
            rig.ram.write(page, b"full")
            rig.submit(Placed(Exchange(b""), [Segment(page, PAGE, True)]), queue=queue)
        rig.rings[queue].publish()
        rig.kick(queue)
        write_at_once(rig, queue, chosen)
        expect_kept(rig, chosen, turn)


@pytest.mark.requirement("split.desc.readable-unwritten", "packed.desc.readable-unwritten")
def test_reported_range_that_is_device_readable(rig: Rig, numbering: Numbering) -> None:
    """A device-readable descriptor in the reporting queue is no report: its pages stay."""
    numbers = numbering.numbers(F.PAGE_REPORTING, rig.offered)
    if "report" not in numbers:
        not_applicable("reporting is not offered")
    bring_up(rig, F.PAGE_REPORTING, numbers)
    queue = numbers["report"]
    start = pages(rig, 6)
    placed = Placed(Exchange(b""), [Segment(start, 2 * PAGE, False)])
    rig.submit(placed, queue=queue)
    before = rig.ram.picture()
    rig.rings[queue].publish()
    rig.kick(queue)
    rig.main_quiet(0.15)
    rig.survive(spinning=True)
    rig.ram.expect_untouched(before, rig.allowed())
