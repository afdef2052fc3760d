# SPDX-License-Identifier: Apache-2.0
"""A snapshot that copies most of the memory while the guest runs.

=========  =====================================================================================
look       as always, and whether writes can be tracked here
track      writes, from before the guest is asked for its free pages
ask        the guest: a walk, or free page hinting; ``skip = told free and not written since``
unplug     the balloon
round      copy everything but these, while the guest runs; then again what was written
stop       when little is left, or it does not become less
copy       what was written since the last round, and blank what became a hole
=========  =====================================================================================

and on from there as always.  Between rounds the guest is stopped for the moment in which the
marks are read and cleared.
"""

from __future__ import annotations

import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vballoon.errors import UsageError
from vballoon.skipmap import Provenance, SkipExport
from vballoon.snapshot import extents as ext
from vballoon.snapshot.device import unplug
from vballoon.snapshot.plan import Copied, Plan, Taken
from vballoon.snapshot.store import DirectoryStore, ram_name
from vballoon.snapshot.take import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from vballoon.control.client import ControlClient
    from vballoon.snapshot.memmap import FreeMemory
    from vballoon.snapshot.recovery import Guardian, Note
    from vballoon.snapshot.tracker import WriteTracker
    from vballoon_spec.snapshot import SnapshotManifest

    Extents = list[NDArray[np.int64]]

__all__ = ("LiveSnapshot",)

ROUNDS_MAX = 6
ENOUGH = 32 << 20
"""Bytes left at which the guest is stopped: some hundredths of a second of copying."""
ASK_SECONDS = 30.0
FOREIGN = ("vhost-user", "vfio-", "vhost-vsock", "vhost-scsi", "vdpa", "vhost-vdpa")
"""Devices by whose writes QEMU's page tables are not marked."""


@dataclass(slots=True)
class LiveSnapshot(Snapshot):
    """A snapshot with *tracker* into a DirectoryStore; *control* is asked for free pages.

    *make_tracker* gets the memory files' (address in QEMU, size).
    """

    control: ControlClient | None = None
    make_tracker: Callable[[list[tuple[int, int]]], WriteTracker] | None = None

    def _steps(self, plan: Plan, note: Note, guardian: Guardian) -> SnapshotManifest:
        tracker = self._tracker(plan)
        self._begin("track")
        self._start(tracker, note, guardian)
        self._begin("ask")
        skip = self._told_free()

        self._begin("unplug")
        note.unplug = True
        guardian.note(note)
        unplug(self.vm, plan.device, self.unplug_seconds)

        self._begin("rounds")
        wanted = [
            ext.without(ext.data_extents(f.fd, f.size), ext.to_file(skip, f.regions))
            for _, f in plan.memory
        ]
        state = self._prepare_state(plan, note, guardian)
        written = self._rounds(plan, note, guardian, tracker, wanted)
        stopped_ns = time.time_ns()
        free, why = self._save_state(state)
        copied = self._copy_rest(plan, free, written)
        return self._resume(plan, note, guardian, state, Taken(copied, why, stopped_ns))

    def _tracker(self, plan: Plan) -> WriteTracker:
        if not isinstance(self.store, DirectoryStore) or self.make_tracker is None:
            raise UsageError("a live snapshot needs a directory: pages are copied more than once")
        for parent in ("/machine/peripheral", "/machine/peripheral-anon"):
            for child in self.vm.execute("qom-list", path=parent):
                kind = child["type"].removeprefix("child<").removesuffix(">")
                path = f"{parent}/{child['name']}"
                if path != plan.device.path and kind.startswith(FOREIGN):
                    raise UsageError(f"no live snapshot: writes of {path} ({kind}) are not seen")
        networks = self.vm.execute("human-monitor-command", **{"command-line": "info network"})
        if other := re.search(r"^.*type=(vhost-user|vhost-vdpa).*$", networks, re.MULTILINE):
            raise UsageError(f"no live snapshot: writes of {other[0].strip()} are not seen")
        hosts = {block.name: block.host for block in self.vm.ram_blocks()}
        return self.make_tracker([(hosts[m.id], f.size) for m, f in plan.memory])

    def _start(self, tracker: WriteTracker, note: Note, guardian: Guardian) -> None:
        """Begin to track, while the guest stands: a read from a disk that is under way would come
        after its page was marked, and the mark be cleared before it.
        """
        note.stop = True
        guardian.note(note)
        self.vm.execute("stop")
        tracker.start()
        self.vm.execute("cont")
        note.stop = False
        guardian.note(note)

    def _told_free(self) -> NDArray[np.uint64]:
        """Page ranges that the guest has told free in a whole round; none if it cannot."""
        none = np.empty((0, 2), np.uint64)
        assert self.control is not None
        if self.source.poison:
            return none
        for command, provenance in (
            ("start-walk", Provenance.WALKED),
            ("start-hinting", Provenance.HINTED),
        ):
            try:
                number = self.control.execute(command)["round"]
            except UsageError:
                continue  # the driver lacks it
            try:
                data = self.control.wait_event("ROUND_COMPLETED", ASK_SECONDS)["data"]
            except TimeoutError:
                data = {}
            if data.get("round") == number and data.get("complete"):
                return self._export(provenance)
            self.observer.say("the guest did not tell all of its free pages; none is believed")
        return none

    def _export(self, provenance: Provenance) -> NDArray[np.uint64]:
        assert self.control is not None
        with tempfile.TemporaryDirectory(prefix="vballoon-") as folder:
            place = str(Path(folder) / "bits")
            self.control.execute("export-skip-bitmap", {"directory": place})
            return SkipExport(place).bitmap(provenance).extents()

    def _rounds(
        self, plan: Plan, note: Note, guardian: Guardian, tracker: WriteTracker, wanted: Extents
    ) -> Extents:
        """Copy while the guest runs; returns what is left when it has been stopped for good."""
        before = None
        for number in range(1, ROUNDS_MAX + 1):
            self._copy_extents(plan, wanted)
            self._begin("stop")
            note.stop = True
            guardian.note(note)
            self.vm.execute("stop")
            wanted = [
                ext.common(written, ext.data_extents(f.fd, f.size))
                for written, (_, f) in zip(tracker.collect(), plan.memory, strict=True)
            ]
            left = sum(ext.length(w) for w in wanted)
            hopeless = before is not None and left > before * 3 // 4
            if left <= ENOUGH or hopeless or number == ROUNDS_MAX:
                break
            before = left
            self.vm.execute("cont")
            note.stop = False
            guardian.note(note)
        return wanted

    def _copy_extents(self, plan: Plan, wanted: Extents) -> list[int]:
        self.observer.size(sum(ext.length(w) for w in wanted))
        return [
            self.store.copy(
                i, ram_name(memdev.id), file.fd, file.size, wanted[i], self.observer.copied
            )
            for i, (memdev, file) in enumerate(plan.memory)
        ]

    def _copy_rest(self, plan: Plan, free: FreeMemory | None, written: Extents) -> Copied:
        """The last round, on the stopped guest; then nothing is in the copy that is a hole here."""
        assert isinstance(self.store, DirectoryStore)
        self._begin("copy")
        verified = 0
        for i, (_, file) in enumerate(plan.memory):
            if free is not None:
                less = ext.without(written[i], ext.to_file(free.ranges, file.regions))
                verified += ext.length(written[i]) - ext.length(less)
                written[i] = less
        self._copy_extents(plan, written)
        sizes, holes = [], 0
        for memdev, file in plan.memory:
            data = ext.data_extents(file.fd, file.size)
            sizes.append(self.store.keep_only(ram_name(memdev.id), data))
            holes += file.size - ext.length(data)
        return Copied(sizes, {"holes": holes, "verified": verified})
