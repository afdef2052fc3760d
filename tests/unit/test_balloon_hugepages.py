# SPDX-License-Identifier: Apache-2.0
"""A balloon on huge pages: parts add up while the driver keeps its word, and only then."""

from __future__ import annotations

import pytest
from tests.fakes.rig import MIB, Rig

from vballoon.balloon.device import ALL_FEATURES
from vballoon.memory import data_extents
from virtio_formats.virtio.balloon import BalloonFeature

INFLATE, DEFLATE, REPORT = 0, 1, 4
FIRST = 8 * MIB >> 12  # page number of the huge page that the tests are about
PAGES = 2 * MIB >> 12


def huge_rig(features: int = int(ALL_FEATURES)) -> Rig:
    """Return a rig that claims huge pages: the rules do not depend on what backs the memory."""
    rig = Rig(features=features)
    rig.memory.regions[0].page_size = 2 * MIB
    rig.fill(FIRST, PAGES)
    return rig


def gone(rig: Rig) -> bool:
    """Whether the huge page is a hole of the backing file; it must be data or hole as a whole."""
    low, high = FIRST << 12, (FIRST + PAGES) << 12
    data = [(max(a, low), min(b, high)) for a, b in data_extents(rig.memory.regions[0]).tolist()]
    held = sum(b - a for a, b in data if a < b)
    assert held in (0, 2 * MIB)
    return held == 0


def inflate(rig: Rig, pages: range) -> None:
    for at in range(pages.start, pages.stop, 64):
        rig.send(INFLATE, rig.pfns(*range(at, min(at + 64, pages.stop))))


def test_the_last_part_frees_the_huge_page() -> None:
    rig = huge_rig()
    inflate(rig, range(FIRST, FIRST + PAGES - 1))
    assert not gone(rig)
    inflate(rig, range(FIRST + PAGES - 1, FIRST + PAGES))
    assert gone(rig)
    assert rig.balloon.counters.discarded_bytes == 2 * MIB


def test_a_deflated_part_is_in_use() -> None:
    rig = huge_rig()
    inflate(rig, range(FIRST, FIRST + 100))
    rig.send(DEFLATE, rig.pfns(FIRST + 7))
    inflate(rig, range(FIRST + 100, FIRST + PAGES))
    assert not gone(rig)
    inflate(rig, range(FIRST + 7, FIRST + 8))
    assert gone(rig)


def test_a_driver_that_need_not_tell_keeps_its_huge_page() -> None:
    rig = huge_rig(int(ALL_FEATURES & ~BalloonFeature.MUST_TELL_HOST))
    inflate(rig, range(FIRST, FIRST + PAGES))
    assert not gone(rig)


def test_a_whole_huge_page_at_once_goes_in_any_case() -> None:
    rig = huge_rig(int(ALL_FEATURES & ~BalloonFeature.MUST_TELL_HOST))
    rig.send(INFLATE, rig.pfns(*range(FIRST, FIRST + PAGES)))
    assert gone(rig)


def test_reported_parts_never_add_up() -> None:
    rig = huge_rig()
    for half in (0, PAGES // 2):
        rig.send(REPORT, (rig.pages(FIRST + half, PAGES // 2),))
    assert not gone(rig)
    rig.send(REPORT, (rig.pages(FIRST, PAGES),))
    assert gone(rig)


@pytest.mark.parametrize("how", ["reset", "restart"])
def test_a_reset_gives_every_part_back(how: str) -> None:
    rig = huge_rig()
    inflate(rig, range(FIRST, FIRST + PAGES // 2))
    getattr(rig.balloon, how)()
    rig.balloon.start()
    inflate(rig, range(FIRST + PAGES // 2, FIRST + PAGES))
    assert not gone(rig)
