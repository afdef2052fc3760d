# SPDX-License-Identifier: Apache-2.0
"""A guest that starts anew and loads no driver: its former balloon is memory in use.

Over vhost-user the device sees the rings stop, as in a pause, and nothing more.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.fakes.rig import Rig

from vballoon.skipmap import Provenance, SkipExport, write_export
from vballoon_spec.skipmap import LiveHeader

FIRST, PAGES = 2048, 64
USED = (FIRST + 3, FIRST + 40)
BALLOONED = Provenance.BALLOONED


def inflated(*, discard: bool = True) -> Rig:
    rig = Rig(discard=discard)
    rig.fill(FIRST, PAGES)
    rig.send(0, rig.pfns(*range(FIRST, FIRST + PAGES)))
    return rig


def stop_rings(rig: Rig) -> None:
    rig.balloon.stop()
    rig.queues = {}


def exported(rig: Rig, folder: Path) -> set[int]:
    """Pages that an export says may be left out."""
    write_export(rig.balloon.skipmap, folder)
    return set(SkipExport(folder).skippable(None).extents().numbers().tolist())


def live(rig: Rig) -> LiveHeader:
    fd = rig.balloon.skipmap.open_fd()
    try:
        return LiveHeader.parse(os.pread(fd, LiveHeader.SIZE, 0))
    finally:
        os.close(fd)


@pytest.mark.parametrize("rings_stop", [True, False])  # False: by kexec, the rings just fall silent
def test_no_exported_page_holds_data_of_the_new_boot(rings_stop: bool, tmp_path: Path) -> None:
    rig = inflated()
    every = set(range(FIRST, FIRST + PAGES))
    assert exported(rig, tmp_path / "before") == every
    if rings_stop:
        stop_rings(rig)
    for page in USED:
        rig.fill(page)
    assert exported(rig, tmp_path / "after") == every - set(USED)
    shown = rig.balloon.skipmap.valid_now(BALLOONED).count()
    assert shown == PAGES - len(USED)


def test_without_discarding_nothing_is_left_out_while_no_ring_runs(tmp_path: Path) -> None:
    rig = inflated(discard=False)
    assert len(exported(rig, tmp_path / "running")) == PAGES
    queues = rig.queues
    stop_rings(rig)
    assert exported(rig, tmp_path / "stopped") == set()
    rig.queues = queues
    rig.balloon.start()  # it was a pause
    assert len(exported(rig, tmp_path / "again")) == PAGES


def test_the_device_says_that_no_driver_runs() -> None:
    rig = inflated()
    assert rig.balloon.driver_running
    assert (live(rig).driver_running, live(rig).discards) == (1, 1)
    rig.balloon.memory_changed()  # the same driver in another memory table
    assert (rig.balloon.driver_running, live(rig).driver_running) == (True, 1)
    stop_rings(rig)
    assert not rig.balloon.driver_running
    assert live(rig).driver_running == 0
    assert live(inflated(discard=False)).discards == 0
