# SPDX-License-Identifier: Apache-2.0
"""The driver side of the suite: rings that wrap, memory that is watched, reports."""

from __future__ import annotations

import os

import pytest

from virtio_conformance.findings import Finding
from virtio_conformance.memory import PAGE, GuestRam
from virtio_conformance.options import OPTIONS
from virtio_conformance.page import render
from virtio_conformance.plugin import repeat_command
from virtio_conformance.profiles import Profile
from virtio_conformance.record import Record, Run
from virtio_conformance.requirements.marks import SUITE
from virtio_conformance.rig_vhost_user import VhostUserRig
from virtio_conformance.ring import DriverRing, Segment
from virtio_conformance.ring_packed import PackedRing
from virtio_conformance.ring_split import SplitRing
from virtio_conformance.target import Options, Target
from virtio_conformance.verdict import FAILED, PASSED, WARNED, exit_status, verdicts


@pytest.fixture
def ram():
    made = GuestRam()
    yield made
    made.close()


def use_split(ring: SplitRing, length: int) -> None:
    """Use all buffers in order, like a device."""
    while ring.used_idx != int(ring.avail[1]):
        slot = ring.used_idx % ring.size
        ring.elements[slot] = (int(ring.avail[2 + slot]), length)
        ring.used_words[1] = (ring.used_idx + 1) & 0xFFFF


class PackedDevice:
    """Use all buffers in order, like a device."""

    def __init__(self, ring: PackedRing) -> None:
        self.ring, self.slot, self.wrap = ring, 0, 1

    def use(self, length: int) -> None:
        ring = self.ring
        while True:
            flags = int(ring.desc["flags"][self.slot])
            if bool(flags & 0x80) != bool(self.wrap) or bool(flags & 0x8000) == bool(self.wrap):
                return
            start, wrap = self.slot, self.wrap
            while True:
                last = int(ring.desc["flags"][self.slot])
                name = int(ring.desc["id"][self.slot])
                self.slot += 1
                if self.slot == ring.size:
                    self.slot, self.wrap = 0, self.wrap ^ 1
                if not last & 1:
                    break
            ring.write_slot(start, 0, length, name, (0x8080 if wrap else 0) | 2)


@pytest.mark.parametrize("size", [4, 5, 7, 16])
@pytest.mark.parametrize("packed", [False, True])
def test_rings_go_around(ram: GuestRam, packed: bool, size: int) -> None:
    if not packed and size in (5, 7):
        size *= 2
        size = 1 << size.bit_length()
    ring: DriverRing = PackedRing(ram, size) if packed else SplitRing(ram, size, start=65530)
    device = PackedDevice(ring) if isinstance(ring, PackedRing) else None
    where = ram.alloc(64, 64, 1)
    for turn in range(5 * size):
        count = 1 + turn % 3
        ids = [ring.add([Segment(where, 1, True)] * count, publish=False)]
        if 2 * count <= size:
            ids.append(ring.add([Segment(where, 1, True)] * count, publish=False))
        ring.publish()
        use_split(ring, 7) if isinstance(ring, SplitRing) else device.use(7)
        assert [u.id for u in ring.collect(len(ids), 0.1)] == ids
        assert ring.outstanding == 0


def test_a_buffer_that_comes_back_twice_is_a_finding(ram: GuestRam) -> None:
    ring = SplitRing(ram, 8)
    head = ring.add([Segment(0, 1)])
    ring.elements[0] = ring.elements[1] = (head, 0)
    ring.used_words[1] = 2
    with pytest.raises(Finding, match="was not with the device"):
        ring.poll()


def test_a_write_mark_on_a_buffer_that_cannot_be_written_is_a_finding(ram: GuestRam) -> None:
    ring = PackedRing(ram, 8)
    ring.add([Segment(0, 1)])
    PackedDevice(ring).use(7)
    with pytest.raises(Finding, match="nothing can be written"):
        ring.poll()


def test_a_used_index_out_of_bounds_is_a_finding(ram: GuestRam) -> None:
    ring = SplitRing(ram, 8)
    ring.add([Segment(0, 1)])
    ring.used_words[1] = 9
    with pytest.raises(Finding, match="used index 9"):
        ring.poll()


@pytest.mark.parametrize("offset", [0, 1, PAGE, 2**20, 2**21 - 1])
def test_memory_notices_every_byte(ram: GuestRam, offset: int) -> None:
    before = ram.picture()
    ram.write(0x4000_0000 + offset, bytes([ram.read(0x4000_0000 + offset, 1)[0] ^ 1]))
    with pytest.raises(Finding, match=f"{0x4000_0000 + offset:#x}"):
        ram.expect_untouched(before)
    ram.expect_untouched(before, [(0x4000_0000 + offset, 0x4000_0000 + offset + 1)])


def test_memory_notices_its_guards(ram: GuestRam) -> None:
    before = ram.picture()
    region = ram.regions[0]
    os.pwrite(region.fd, b"\0", region.offset + region.size)
    with pytest.raises(Finding, match="outside its region"):
        ram.expect_untouched(before, [(0, 1 << 40)])


def test_looking_at_memory_fills_no_hole(ram: GuestRam) -> None:
    region = ram.regions[1]
    region.view.madvise(9, 0, 16 * PAGE)  # MADV_REMOVE
    assert ram.is_hole(0x4000_0000, 16 * PAGE)
    ram.picture()
    ram.read(0x4000_0000, 16 * PAGE)
    assert ram.is_hole(0x4000_0000, 16 * PAGE)


def test_a_device_that_is_no_good_for_a_test_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of one connection would wait for it, and the next test for the server."""
    left: list[str] = []

    def connect(rig: VhostUserRig) -> None:
        rig._offered = 0

    monkeypatch.setattr(VhostUserRig, "connect", connect)
    monkeypatch.setattr(VhostUserRig, "leave", lambda rig: left.append("left"))
    with pytest.raises(pytest.skip.Exception):
        VhostUserRig(Target(Options()), Profile(), packed=True)
    assert left == ["left"]


def a_run() -> Run:
    return Run(
        "vhost-user", "balloon", "backend <here>",
        records=[
            Record("test_a.py::test_one", "passed", requirements=["split.used.id"]),
            Record("test_a.py::test_two", "failed", requirements=["split.used-notify.flag-set"],
                   broken="split.used-notify.flag-set", observed="Finding: it is <loud>",
                   wire="-> GET_FEATURES", repeat="virtio-conformance ..."),
            Record("test_a.py::test_three", "failed", requirements=["split.used.len-first"],
                   broken="split.used.len-first"),
        ],
    )  # fmt: skip


def test_verdicts_distinguish_must_from_should() -> None:
    found = {verdict.row.id: verdict.status for verdict in verdicts(a_run())}
    assert found["split.used.id"] == PASSED
    assert found["split.used-notify.flag-set"] == WARNED
    assert found["split.used.len-first"] == FAILED
    assert exit_status(a_run(), verdicts(a_run())) == 1
    assert "pci.id.vendor" not in found  # another transport's


def test_the_page_has_every_row_and_escapes_what_it_quotes() -> None:
    run = a_run()
    page = render(run, verdicts(run))
    for verdict in verdicts(run):
        assert f'id="{verdict.row.id}"' in page
    assert "it is &lt;loud&gt;" in page
    assert "<here>" not in page


def test_the_line_that_repeats_a_test_names_every_option() -> None:
    options = Options(command="x {socket}", protocol="vfio-user", before="b", device="blk",
                      polls=True, discards=False, keep=True, config_change="c")  # fmt: skip
    line = repeat_command(options, "/somewhere/suite/test_a.py::test_b[1 2]")
    assert line == (
        "virtio-conformance --spawn 'x {socket}' --protocol vfio-user --before b --config-change c"
        " --device blk --keep --polls --no-discards --only 'test_a.py::test_b[1 2]'"
    )
    assert "--config-change" in OPTIONS


def test_every_file_of_the_suite_says_what_it_is_for() -> None:
    assert all('"""' in path.read_text()[:120] for path in SUITE.glob("*.py"))
