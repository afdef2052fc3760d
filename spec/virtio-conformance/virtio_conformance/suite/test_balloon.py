# SPDX-License-Identifier: Apache-2.0
"""The memory balloon: the effect of its requests, observed in guest memory only."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from virtio_conformance.balloon import (
    DEFLATE,
    INFLATE,
    expect_freed,
    inflate,
    no_bytes,
    pages,
    pfns,
)
from virtio_conformance.findings import Finding, not_applicable, require
from virtio_conformance.memory import PAGE
from virtio_conformance.profiles import Exchange
from virtio_conformance.rig import Rig


@pytest.fixture(autouse=True)
def only_balloons(profile: Any) -> None:
    """Skip these tests for other device types."""
    if profile.name != "balloon":
        not_applicable("for memory balloons")


@pytest.mark.requirement("balloon.inflate.exact", "balloon.inflate.frees", "balloon.used-len.zero")
@pytest.mark.parametrize("region", [0, 1, 2, 3])
def test_inflate_frees_exactly(rig: Rig, region: int) -> None:
    """Pages of an inflate request are holes by its acknowledgement; their neighbours are not."""
    rig.bring_up()
    start = pages(rig, 9, region)
    chosen = [start + i * PAGE for i in (1, 2, 5, 7)]
    inflate(rig, pfns(*chosen), [(page, page + PAGE) for page in chosen])
    for i in range(9):
        if i in (1, 2, 5, 7):
            expect_freed(rig, start + i * PAGE, 1)
        else:
            require(not rig.ram.is_hole(start + i * PAGE), f"page {i} is a hole")


@pytest.mark.requirement("balloon.inflate.exact", "balloon.inflate.frees")
def test_first_and_last_page_of_regions(rig: Rig) -> None:
    """At a region's edges only guest memory is freed, not the file around it."""
    rig.bring_up()
    for region in rig.ram.regions[1:]:
        for page in (region.end - PAGE, region.guest + region.size // 2):
            inflate(rig, pfns(page), [(page, page + PAGE)])
            expect_freed(rig, page, 1)


@pytest.mark.requirement("balloon.length.any", "balloon.inflate.frees")
@pytest.mark.parametrize("count", [256, 257, 512])
def test_long_lists(rig: Rig, count: int) -> None:
    """More than 256 page numbers in one buffer, also cut into descriptors."""
    rig.bring_up()
    start = pages(rig, count)
    data = pfns(*[start + i * PAGE for i in range(count)])
    placed = rig.place(
        Exchange(data, verify=no_bytes, may_change=((start, start + count * PAGE),)),
        cut=(4, 1, 100, 3),
    )
    rig.run([placed])
    expect_freed(rig, start, count)


@pytest.mark.requirement("balloon.robust.length")
@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 9])
def test_lists_of_odd_length(rig: Rig, length: int) -> None:
    """Lists that end within a number: the buffer comes back, or the queue is stopped."""
    rig.bring_up()
    start = pages(rig, 3)
    data = pfns(start, start + PAGE, start + 2 * PAGE)[:length]
    placed = rig.submit(rig.place(Exchange(data)))
    before = rig.ram.picture()
    rig.main.publish()
    rig.kick(INFLATE)
    rig.main_quiet(0.1)
    rig.survive()
    whole = length // 4
    rig.ram.expect_untouched(before, [*rig.allowed(), (start, start + whole * PAGE)])
    if rig.main.poll():
        inflate(rig, pfns(start), [(start, start + PAGE)])
    require(placed.id >= 0, "the suite did not submit")


@pytest.mark.requirement("balloon.pfn.unsigned")
@pytest.mark.parametrize("queue", [INFLATE, DEFLATE], ids=["inflate", "deflate"])
@pytest.mark.parametrize(
    "pfn", [0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x30000, 0x200, 0x3FFFF, 0x40600, 0xC0000], ids=hex
)
def test_pages_that_do_not_exist(rig: Rig, queue: int, pfn: int) -> None:
    """Numbers outside memory change nothing; the good ones beside them may be honoured."""
    rig.bring_up()
    start = pages(rig, 2)
    data = pfns(start) + struct.pack("<I", pfn) + pfns(start + PAGE)
    rig.submit(rig.place(Exchange(data)), queue=queue)
    before = rig.ram.picture()
    ring = rig.rings[queue]
    ring.publish()
    rig.kick(queue)
    rig.main_quiet(0.1)
    rig.survive()
    span = (start, start + 2 * PAGE) if queue == INFLATE else (start, start)
    rig.ram.expect_untouched(before, [*rig.allowed(), span])


@pytest.mark.requirement("balloon.deflate.untouched", "balloon.used-len.zero")
def test_deflate_changes_nothing(rig: Rig) -> None:
    """Deflating leaves memory alone: pages the guest writes after it are the guest's."""
    rig.bring_up()
    start = pages(rig, 4)
    every = [start + i * PAGE for i in range(4)]
    inflate(rig, pfns(*every), [(start, start + 4 * PAGE)])
    rig.ram.write(start + PAGE, b"guest" * 100)
    inflate(rig, pfns(*every), [], queue=DEFLATE)
    inflate(rig, pfns(*every), [], queue=DEFLATE)
    require(rig.ram.read(start + PAGE, 5) == b"guest", "the guest's data is gone")
    inflate(rig, pfns(start), [(start, start + PAGE)])
    expect_freed(rig, start, 1)


@pytest.mark.requirement("balloon.inflate.exact", "balloon.deflate.untouched")
def test_inflate_deflate_inflate_neighbours(rig: Rig) -> None:
    """Pages taken back are not freed with later inflations of their neighbours."""
    rig.bring_up()
    start = pages(rig, 512, 1)
    half = [start + i * PAGE for i in range(256)]
    inflate(rig, pfns(*half), [(start, start + 256 * PAGE)])
    inflate(rig, pfns(*half), [], queue=DEFLATE)
    rig.ram.write(start, b"\x77" * (256 * PAGE))
    rest = [start + i * PAGE for i in range(256, 512)]
    inflate(rig, pfns(*rest), [(start + 256 * PAGE, start + 512 * PAGE)])


# -- configuration ---------------------------------------------------------------------------


@pytest.mark.requirement("balloon.config.actual")
def test_configuration_fields(split_rig: Rig) -> None:
    """actual is the driver's; num_pages and the hinting command are the device's."""
    rig = split_rig
    rig.bring_up()
    rig.write_config(4, (1234).to_bytes(4, "little"))
    whole = rig.read_config(0, 16)
    require(whole[4:8] == (1234).to_bytes(4, "little"), f"actual reads {whole[4:8].hex()}")
    try:
        rig.write_config(0, b"\x11\x22\x33\x44" * 4)  # the whole block, as some front-ends do
    except Finding as refused:
        require("errno" in str(refused) or "closed" in str(refused), str(refused))
        return
    after = rig.read_config(0, 16)
    require(after[0:4] == whole[0:4], f"num_pages was overwritten: {after[0:4].hex()}")
    require(after[8:12] == whole[8:12], f"the hinting command was overwritten: {after[8:12].hex()}")


@pytest.mark.requirement("balloon.config.actual")
def test_configuration_change_reaches_the_front_end(split_rig: Rig, options: Any) -> None:
    """A target that the operator sets shows in num_pages."""
    rig = split_rig
    rig.bring_up()
    if not options.config_change:
        not_applicable("--config-change says how to make the device change its configuration")
    before = rig.read_config(0, 4)
    rig.change_configuration()
    rig.main_quiet(0.1)
    after = rig.read_config(0, 4)
    require(after != before, f"num_pages reads {after.hex()} before and after")
