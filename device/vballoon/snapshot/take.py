# SPDX-License-Identifier: Apache-2.0
"""Taking a snapshot: the steps, in order, each of which can be undone.

=========  =====================================================================================
look       what QEMU and the backend have; nothing is changed yet
unplug     the balloon, because QEMU does not save a machine with it
stop       the guest; from here on time counts
state      of the devices, written by QEMU
verify     which pages are in the guest's free lists, read from its own memory
copy       all data of guest memory but these
resume     the guest
plug       the balloon in again
finish     checksums, everything on the disk, and last the manifest
=========  =====================================================================================

A machine that is to end does so after ``finish``, and from then on the snapshot is the machine:
whatever happens, it is kept.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vballoon.errors import UsageError
from vballoon.snapshot import extents as ext
from vballoon.snapshot.device import find_balloon, plug, require_balloon, unplug
from vballoon.snapshot.match import match_memory
from vballoon.snapshot.memmap import VerificationRefused
from vballoon.snapshot.plan import Copied, Observer, Plan, Taken
from vballoon.snapshot.qmp_vm import QemuGone
from vballoon.snapshot.recovery import Guardian, Note, go_back
from vballoon.snapshot.state import DeviceState, as_migration, choose_kind, ignores_shared
from vballoon.snapshot.store import ram_name
from vballoon_spec.snapshot import MemoryFile, SnapshotManifest, StateFile, StateKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from vballoon.snapshot.memmap import FreeMemory
    from vballoon.snapshot.qmp_vm import QemuVm
    from vballoon.snapshot.source import GuestSource
    from vballoon.snapshot.store import Store

__all__ = ("Observer", "Snapshot")

QUIT_SECONDS = 60.0
"""How long QEMU may take to end: its disks may have much to write."""


@dataclass(slots=True)
class Snapshot:
    """One snapshot of *vm*, whose balloon's backend gave *source*, into *store*.

    *free_memory* finds the pages to leave out, on the stopped guest; tests put other ways here.
    """

    vm: QemuVm
    source: GuestSource
    store: Store
    observer: Observer = field(default_factory=Observer)
    device_id: str | None = None
    device_socket: str | None = None
    unplug_seconds: float = 20.0
    quit: bool = False
    free_memory: Callable[[GuestSource], FreeMemory] | None = None
    times: dict[str, float] = field(default_factory=dict)

    def take(self) -> SnapshotManifest:
        """Do it.  Whatever fails, the guest runs on with its balloon, and the store is empty."""
        with Guardian() as guardian:
            note = Note(self.vm.path)
            try:
                plan = self._look(note)
                manifest = self._steps(plan, note, guardian)
            except BaseException as error:
                if note.over:  # the only one that is left of this machine
                    raise
                troubles = go_back(self.vm, note)
                self.store.discard()
                for trouble in troubles:
                    self.observer.say(trouble)
                if isinstance(error, OSError):
                    raise UsageError(f"cannot write the snapshot: {error}") from None
                raise
        return manifest

    def _begin(self, name: str) -> None:
        self.times[name] = time.monotonic()
        self.observer.step(name)

    def _look(self, note: Note) -> Plan:
        self._begin("look")
        vm = self.vm
        status = vm.status()
        if status != "running":  # a guest that stands still lets go of nothing
            raise UsageError(f"the machine is {status}; it must be running")
        device = find_balloon(vm, self.device_id, self.device_socket)
        require_balloon(device.arguments)  # or restore would not take it
        note.device_path, note.device = device.path, device.arguments
        note.chardev = device.chardev
        memdevs = vm.memdevs()
        memory = match_memory(vm, self.source)
        kind = choose_kind(vm, [memdev for memdev, _ in memory])
        version = vm.execute("query-version")["qemu"]
        machine = vm.execute("qom-get", path="/machine", property="type")
        qemu = {
            "version": "{major}.{minor}.{micro}".format(**version),
            "machine": str(machine).removesuffix("-machine"),
            "target": str(vm.execute("query-target")["arch"]),
        }
        return Plan(kind, memdevs, memory, device, qemu)

    def _steps(self, plan: Plan, note: Note, guardian: Guardian) -> SnapshotManifest:
        vm = self.vm
        self._begin("unplug")
        note.unplug = True
        guardian.note(note)
        unplug(vm, plan.device, self.unplug_seconds)

        state = self._prepare_state(plan, note, guardian)
        self._begin("stop")
        note.stop = True
        guardian.note(note)
        vm.execute("stop")
        stopped_ns = time.time_ns()
        free, why = self._save_state(state)
        copied = self._copy(plan, free)
        return self._resume(plan, note, guardian, state, Taken(copied, why, stopped_ns))

    def _resume(
        self,
        plan: Plan,
        note: Note,
        guardian: Guardian,
        state: DeviceState,
        taken: Taken,
    ) -> SnapshotManifest:
        """Everything is copied: the guest runs on with its balloon, or ends."""
        vm = self.vm
        if self.quit:  # the machine ends only when there is a snapshot of it
            self._check_unchanged(plan)
            manifest = self._manifest(plan, taken)
            self._hand_over(manifest, note, guardian)
            return manifest
        self._begin("resume")
        vm.execute("cont")
        note.stop = False
        self._begin("plug")
        state.put_away()
        note.migrate = False
        self._check_unchanged(plan)
        plug(vm, plan.device.arguments, plan.device.chardev)
        note.unplug = False
        guardian.note(note)
        manifest = self._manifest(plan, taken)
        self.store.finish(manifest)
        self._begin("done")
        return manifest

    def _hand_over(self, manifest: SnapshotManifest, note: Note, guardian: Guardian) -> None:
        """Make the snapshot whole and end the machine; it must never run here and elsewhere."""
        note.moved = self.store.moves
        guardian.note(note)
        try:
            self.store.finish(manifest)
        except OSError:
            note.moved = False  # its last bytes did not go out
            guardian.note(note)
            raise
        note.over = True
        guardian.note(note)
        self._begin("done")
        with contextlib.suppress(QemuGone):  # it may be gone before it has answered
            self.vm.execute("quit")
        if not self.vm.wait_gone(QUIT_SECONDS):
            raise UsageError("the snapshot is whole, but QEMU does not end; it must not run on")

    def _prepare_state(self, plan: Plan, note: Note, guardian: Guardian) -> DeviceState:
        if plan.kind is StateKind.IGNORE_SHARED:
            note.ignore_shared = ignores_shared(self.vm)
        note.migrate = True
        guardian.note(note)
        fd = self.store.open_state()
        try:
            return DeviceState(self.vm, plan.kind, fd)
        finally:
            os.close(fd)

    def _save_state(self, state: DeviceState) -> tuple[FreeMemory | None, str]:
        """While QEMU writes, the guest's page structures are read, which it leaves alone."""
        self._begin("state")
        state.begin()
        self._begin("verify")
        found = self._free()
        state.wait()
        return found

    def _check_unchanged(self, plan: Plan) -> None:
        """Refuse a machine that got or lost memory since it was looked at: some would be missing.

        (QEMU leaves a backend's memory to us, also that of one which the plan does not know.)  It
        is asked only when the guest runs again: what was there when it stopped is there still.
        """
        if self.vm.memdevs() != plan.memdevs:
            raise UsageError("the machine's memory backends changed meanwhile; try again")

    def _free(self) -> tuple[FreeMemory | None, str]:
        """The free pages, or why they are not known.

        A machine that was reset may not have come far: then what the kernel before it knew is
        still in memory, true to the last bit, and of no kernel that lives.
        """
        try:
            if self.vm.has_seen("RESET"):
                raise VerificationRefused("the machine was reset meanwhile")
            if self.free_memory is not None:
                return self.free_memory(self.source), ""
            return self.source.free_memory(), ""
        except VerificationRefused as error:
            return None, str(error)

    def _copy(self, plan: Plan, free: FreeMemory | None) -> Copied:
        self._begin("copy")
        todo, holes, verified = [], 0, 0
        for _, file in plan.memory:
            data = ext.data_extents(file.fd, file.size)
            wanted = data
            if free is not None:
                wanted = ext.without(data, ext.to_file(free.ranges, file.regions))
            holes += file.size - ext.length(data)
            verified += ext.length(data) - ext.length(wanted)
            todo.append(wanted)
        total = sum(ext.length(wanted) for wanted in todo)
        self.observer.size(total)
        self.store.expect(total)
        sizes = []
        for index, ((memdev, file), wanted) in enumerate(zip(plan.memory, todo, strict=True)):
            sizes.append(
                self.store.copy(
                    index, ram_name(memdev.id), file.fd, file.size, wanted, self.observer.copied
                )
            )
        return Copied(sizes, {"holes": holes, "verified": verified})

    def _manifest(self, plan: Plan, taken: Taken) -> SnapshotManifest:
        self._begin("finish")
        if plan.kind is StateKind.DEVICES_ONLY:
            self.store.change_state(lambda state: as_migration(state, plan.qemu["machine"]))
        state_bytes, state_digest, digests = self.store.digests()
        return SnapshotManifest(
            created_ns=taken.stopped_ns,
            qemu=plan.qemu,
            state=StateFile(plan.kind, state_bytes, state_digest),
            memory=tuple(
                MemoryFile(memdev.id, ram_name(memdev.id), file.size, size, digest)
                for (memdev, file), size, digest in zip(
                    plan.memory, taken.copied.sizes, digests, strict=True
                )
            ),
            left_out=taken.copied.left_out,
            verification=taken.why,
            balloon={"device": plan.device.arguments, "chardev": plan.device.chardev},
            extra={"seconds": self.seconds()},
        )

    def seconds(self) -> dict[str, float]:
        """How long each step took, and how long the guest stood still (``stopped``)."""
        names, at = list(self.times), list(self.times.values())
        took = {n: round(b - a, 6) for n, a, b in zip(names, at, at[1:], strict=False)}
        if "stop" in self.times and "plug" in self.times:
            took["stopped"] = round(self.times["plug"] - self.times["stop"], 6)
        return took
