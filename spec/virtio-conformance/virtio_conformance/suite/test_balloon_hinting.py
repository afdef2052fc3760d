# SPDX-License-Identifier: Apache-2.0
"""Rounds of free page hinting, which the operator starts: command ids, stale hints, DONE."""

from __future__ import annotations

import time
from typing import Any

import pytest

from virtio_conformance.balloon import bring_up, pages
from virtio_conformance.findings import Finding, not_applicable, preparing, require
from virtio_conformance.memory import PAGE
from virtio_conformance.numbering import Numbering
from virtio_conformance.profiles import Exchange
from virtio_conformance.rig import Placed, Rig
from virtio_conformance.ring import Segment
from virtio_formats.virtio.balloon import BalloonCmdId, BalloonFeature

HINT = BalloonFeature.FREE_PAGE_HINT
STOP, DONE = 0, 1
LIMIT = 5.0
"""Seconds that an operator's command may take to show in the configuration."""


@pytest.fixture
def queue(split_rig: Rig, profile: Any, numbering: Numbering, options: Any) -> int:
    """Return the number of the hinting queue of a running device."""
    if profile.name != "balloon":
        not_applicable("for memory balloons")
    if not options.hint_start:
        not_applicable("--hint-start says how to start a round of hinting")
    numbers = numbering.numbers(HINT, split_rig.offered)
    bring_up(split_rig, HINT, numbers)
    return numbers["hint"]


def command_id(rig: Rig) -> int:
    """Return the command id in the configuration space."""
    return int.from_bytes(rig.read_config(8, 4), "little")


def start_round(rig: Rig, not_ids: tuple[int, ...] = (STOP, DONE)) -> int:
    """Have the operator start a round and return its command id."""
    with preparing():
        rig.target.operate(rig.target.options.hint_start, rig.main_quiet)
        deadline = time.monotonic() + LIMIT
        while (found := command_id(rig)) in not_ids:
            if time.monotonic() > deadline:
                raise Finding(f"the command id stays {found} after --hint-start")
            rig.main_quiet(0.01)
    return found


def send(rig: Rig, queue: int, *parts: int | Segment) -> None:
    """Send command ids and hinted ranges, each in a buffer of its own."""
    for part in parts:
        if isinstance(part, Segment):
            placed = Placed(Exchange(b""), [part])
        else:
            placed = rig.place(Exchange(BalloonCmdId(cmd_id=part).build()))
        rig.submit(placed, queue=queue)
    rig.rings[queue].publish()
    rig.kick(queue)
    rig.collect(rig.rings[queue], len(parts))


def await_done(rig: Rig) -> None:
    """Raise a finding unless DONE shows after the operator ended the round."""
    if rig.target.options.hint_done:
        with preparing():
            rig.target.operate(rig.target.options.hint_done, rig.main_quiet)
    deadline = time.monotonic() + LIMIT
    while (found := command_id(rig)) != DONE:
        told = f"the command id stays {found} after the round ended"
        require(time.monotonic() < deadline, told, row="balloon.hint.done-reported")
        rig.main_quiet(0.01)


@pytest.mark.requirement("balloon.hint.done-reported", "balloon.hint.done-untouched")
def test_a_round_ends_with_done(split_rig: Rig, queue: int) -> None:
    """After STOP from the driver and the end of the operator's work, the command id is DONE."""
    rig = split_rig
    command = start_round(rig)
    start = pages(rig, 4)
    send(rig, queue, command, Segment(start, 4 * PAGE, True), STOP)
    await_done(rig)
    rig.ram.write(start, b"\x5c" * 4 * PAGE)
    before = rig.ram.picture()
    rig.main_quiet(0.1)
    rig.ram.expect_untouched(before, rig.allowed(), row="balloon.hint.done-untouched")


@pytest.mark.requirement("balloon.hint.done-untouched")
def test_hints_after_done(split_rig: Rig, queue: int) -> None:
    """Hints that come after DONE leave their pages alone."""
    rig = split_rig
    command = start_round(rig)
    send(rig, queue, command, STOP)
    await_done(rig)
    start = pages(rig, 4)
    before = rig.ram.picture()
    ring = rig.rings[queue]
    ring.add([Segment(start, 4 * PAGE, True)])
    rig.kick(queue)
    rig.main_quiet(0.1)
    rig.ram.expect_untouched(before, [*rig.allowed(), *ring.publish_span, table(rig, queue)])


def table(rig: Rig, queue: int) -> tuple[int, int]:
    """Return the address range of the queue's descriptors, which its driver writes."""
    first = rig.rings[queue].areas[0]
    return first, first + 2 * PAGE


@pytest.mark.requirement("balloon.hint.stale-ignored")
def test_hints_of_an_earlier_round(split_rig: Rig, queue: int) -> None:
    """Hints under the id of an earlier round are ignored in a later one."""
    rig = split_rig
    first = start_round(rig)
    send(rig, queue, first, STOP)
    await_done(rig)
    second = start_round(rig)
    require(second != first, f"both rounds have id {first}", row="balloon.hint.no-id-reuse")
    start = pages(rig, 4)
    rig.ram.write(start, b"\x5c" * 4 * PAGE)
    send(rig, queue, first, Segment(start, 4 * PAGE, True))
    rig.main_quiet(0.05)
    require(rig.ram.read(start, PAGE) == b"\x5c" * PAGE, "a page hinted under a stale id changed")
    send(rig, queue, STOP)
    send(rig, queue, second, STOP)
    await_done(rig)


@pytest.mark.requirement("balloon.hint.no-id-reuse")
def test_command_ids_are_not_reused_before_stop(split_rig: Rig, queue: int) -> None:
    """A new round before the driver's STOP has another command id."""
    rig = split_rig
    command = start_round(rig)
    send(rig, queue, command)  # and no STOP
    seen = {command}
    for _ in range(3):
        if rig.target.options.hint_done:
            with preparing():
                rig.target.operate(rig.target.options.hint_done, rig.main_quiet)
        following = start_round(rig, (STOP, DONE))
        require(following not in seen, f"command id {following} is used again before STOP")
        seen.add(following)
