# SPDX-License-Identifier: Apache-2.0
"""The steps of a snapshot that copies most of the memory while the guest runs.

Between rounds the guest is stopped for the moment in which the write marks are read and cleared:
clearing them under a running guest would lose writes.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vballoon.errors import UsageError
from vballoon.memory import PageRanges
from vballoon.skipmap import Provenance, SkipExport
from vballoon.snapshot import extents as ext
from vballoon.snapshot.run import Copied
from vballoon.snapshot.steps import copy_extents
from vballoon.snapshot.store import DirectoryStore, ram_name

if TYPE_CHECKING:
    from vballoon.control.client import ControlClient
    from vballoon.snapshot.run import Run

__all__ = ("ask", "copy_rest", "rounds", "track")

ROUNDS_MAX = 6
ENOUGH = 32 << 20
"""Bytes left at which the guest is stopped for good: some hundredths of a second of copying."""
ASK_SECONDS = 30.0
FOREIGN = ("vhost-user", "vfio-", "vhost-vsock", "vhost-scsi", "vdpa", "vhost-vdpa")
"""Devices whose writes do not mark QEMU's page tables."""


def track(run: Run) -> None:
    """Begin to track writes, before the guest is asked for its free pages.

    The guest is stopped meanwhile: a disk read that is under way could write to a page after its
    mark was set, and the mark would be cleared before the data arrives.
    """
    _require_trackable(run)
    assert run.make_tracker is not None
    hosts = {block.name: block.host for block in run.vm.ram_blocks()}
    run.tracker = run.make_tracker([(hosts[m.id], f) for m, f in run.plan.memory])
    run.stop_guest()
    run.tracker.start()
    run.resume_guest()


def _require_trackable(run: Run) -> None:
    """Raise UsageError where a page could be written without being marked."""
    if not isinstance(run.store, DirectoryStore) or run.make_tracker is None:
        raise UsageError("a live snapshot needs a directory: pages are copied more than once")
    for parent in ("/machine/peripheral", "/machine/peripheral-anon"):
        for child in run.vm.execute("qom-list", path=parent):
            kind = child["type"].removeprefix("child<").removesuffix(">")
            path = f"{parent}/{child['name']}"
            if path != run.plan.device.path and kind.startswith(FOREIGN):
                raise UsageError(f"no live snapshot: writes of {path} ({kind}) are not tracked")
    networks = run.vm.execute("human-monitor-command", **{"command-line": "info network"})
    if other := re.search(r"^.*type=(vhost-user|vhost-vdpa).*$", networks, re.MULTILINE):
        raise UsageError(f"no live snapshot: writes of {other[0].strip()} are not tracked")


def ask(run: Run) -> None:
    """Ask the guest for its free pages; they need not be copied unless written since ``track``."""
    skip = _reported_free(run)
    run.wanted = [
        ext.data_extents(f.fd, f.size) - ext.to_file(skip, f.regions) for _, f in run.plan.memory
    ]


def _reported_free(run: Run) -> PageRanges:
    """Return the page ranges of one complete walk; none if the guest has no walk queue.

    With the option *hint*, a hinting round replaces a walk that the guest cannot make.  It is not
    the default: a guest with init_on_alloc writes each page that it hints, so that all of them are
    resident for some seconds and all are copied, because they were written since ``track``.
    uint64[k, 2], half open, in pages of 4096 bytes.
    """
    none = PageRanges()
    assert run.control is not None
    if run.source.poison:
        return none
    ways = [("start-walk", Provenance.WALKED)]
    if run.options.hint:
        ways.append(("start-hinting", Provenance.HINTED))
    for command, provenance in ways:
        try:
            number = run.control.execute(command)["round"]
        except UsageError:
            continue  # the driver does not have it
        try:
            data = run.control.wait_event("ROUND_COMPLETED", ASK_SECONDS)["data"]
        except TimeoutError:
            data = {}
        if data.get("round") == number and data.get("complete"):
            return export(run.control, provenance)
        run.observer.say("the guest did not report all of its free pages; none is skipped")
    return none


def export(control: ControlClient, provenance: Provenance) -> PageRanges:
    """Return the page ranges of *provenance* in the back-end's skip bitmap."""
    with tempfile.TemporaryDirectory(prefix="vballoon-") as folder:
        place = str(Path(folder) / "bits")
        control.export(place)
        return SkipExport(place).bitmap(provenance).extents()


def rounds(run: Run) -> None:
    """Copy while the guest runs, then again what was written, until little is left; then stop."""
    before = None
    for number in range(1, ROUNDS_MAX + 1):
        copy_extents(run)
        run.begin("stop")  # the last of these is the beginning of the stop
        run.stop_guest()
        run.wanted = [
            written & ext.data_extents(f.fd, f.size)
            for written, (_, f) in zip(run.tracker.collect(), run.plan.memory, strict=True)
        ]
        left = sum(w.total for w in run.wanted)
        not_converging = before is not None and left > before * 3 // 4
        if left <= ENOUGH or not_converging or number == ROUNDS_MAX:
            return
        before = left
        run.resume_guest()


def copy_rest(run: Run) -> None:
    """Copy what was written since the last round, and blank what became a hole meanwhile."""
    assert isinstance(run.store, DirectoryStore)
    verified = 0
    for i, (_, file) in enumerate(run.plan.memory):
        if run.free is not None:
            less = run.wanted[i] - ext.to_file(run.free.ranges, file.regions)
            verified += run.wanted[i].total - less.total
            run.wanted[i] = less
    copy_extents(run)
    sizes, holes = [], 0
    for memdev, file in run.plan.memory:
        data = ext.data_extents(file.fd, file.size)
        sizes.append(run.store.keep_only(ram_name(memdev.id), data))
        holes += file.size - data.total
    run.copied = Copied(sizes, {"holes": holes, "verified": verified})
