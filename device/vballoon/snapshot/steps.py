# SPDX-License-Identifier: Apache-2.0
"""The steps of a snapshot of a stopped guest; ``live`` has those of a running one.

Each is a function of a :class:`~vballoon.snapshot.run.Run` and raises
:class:`~vballoon.errors.VballoonError` or OSError where it cannot be done.  What it changes on the
machine goes through the run's journal.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vballoon.errors import UsageError
from vballoon.snapshot import device
from vballoon.snapshot import extents as ext
from vballoon.snapshot.journal import JournalFile
from vballoon.snapshot.lock import lock_vm
from vballoon.snapshot.match import match_memory
from vballoon.snapshot.memmap import VerificationRefused
from vballoon.snapshot.process import Process, identity
from vballoon.snapshot.recovery import Guardian, end_qemu
from vballoon.snapshot.run import Copied, Plan
from vballoon.snapshot.state import DeviceState, as_migration, choose_kind, ignores_shared
from vballoon.snapshot.store import ram_name
from vballoon_spec.snapshot import MemoryFile, SnapshotManifest, StateFile, StateKind

if TYPE_CHECKING:
    from vballoon.snapshot.memmap import FreeMemory
    from vballoon.snapshot.qmp_vm import QemuVm
    from vballoon.snapshot.run import Run

__all__ = (
    "check", "commit", "copy", "copy_extents", "end", "finish", "guard", "hand_over", "look",
    "offer", "plug", "prepare", "resume", "state", "stop", "unplug", "verify",
)  # fmt: skip


def look(run: Run) -> None:
    """Find out what QEMU and the back-end have. Nothing is changed yet."""
    vm = run.vm
    status = vm.status()
    if status != "running":  # a stopped guest cannot release its balloon
        raise UsageError(f"the machine is {status}; it must be running")
    run.resumes = vm.count_events("RESUME")
    run.process = Process(run.options.qemu_pid or vm.pid)
    balloon = _balloon(run)
    memdevs = vm.memdevs()
    memory = match_memory(vm, run.source, run.process)
    kind = choose_kind(vm, [memdev for memdev, _ in memory])
    run.plan = Plan(kind, memdevs, memory, balloon, _qemu(vm))


def _balloon(run: Run) -> device.BalloonDevice:
    """Return the balloon, which can be plugged in again."""
    socket = run.options.device_socket
    balloon = device.find_balloon(run.vm, run.options.device_id, socket)
    device.require_balloon(balloon.arguments)  # restore would refuse anything else
    folders = [run.process.folder]
    if run.control is not None:
        folders.insert(0, Process(run.control.execute("query-status")["pid"]).folder)
    return device.resolve_socket(balloon, socket, folders)


def guard(run: Run) -> None:
    """Lock the VM, open the journal's file, and start the guardian."""
    balloon, (_, file) = run.plan.device, run.plan.memory[0]
    path = os.path.abspath(run.options.journal or f"{run.vm.path}.journal")
    run.lock = lock_vm(run.process, identity(file.fd))
    journal_file = JournalFile(path)
    before = journal_file.read()
    if before is not None and before.qemu == run.process.name:
        raise UsageError(
            f"an earlier snapshot of this VM was killed; undo it first: "
            f"vballoon snapshot --undo --qmp {run.vm.path}"
        )
    run.journal.write(
        qmp=os.path.abspath(run.vm.path),
        device_path=balloon.path,
        device=balloon.arguments,
        chardev=balloon.chardev,
        qemu=run.process.name,
        memory=identity(file.fd),
        file=path,
    )
    run.journal.add(journal_file.write)
    run.guardian = Guardian(run.lock)
    run.journal.add(run.guardian.send)


def _qemu(vm: QemuVm) -> dict[str, str]:
    """Return the manifest's description of this QEMU."""
    version = vm.execute("query-version")["qemu"]
    machine = vm.execute("qom-get", path="/machine", property="type")
    return {
        "version": "{major}.{minor}.{micro}".format(**version),
        "machine": str(machine).removesuffix("-machine"),
        "target": str(vm.execute("query-target")["arch"]),
    }


def unplug(run: Run) -> None:
    """Unplug the balloon."""
    with run.journal.doing(unplug=True):
        try:
            device.unplug(run.vm, run.plan.device, run.options.unplug_seconds)
        except device.UnplugRefused:
            run.journal.write(unplug=False)
            raise


def prepare(run: Run) -> None:
    """Give QEMU a file for the device state and have it leave out shared memory."""
    if run.plan.kind is StateKind.IGNORE_SHARED:
        run.journal.write(ignore_shared=ignores_shared(run.vm))
    with run.journal.doing(migrate=True):
        fd = run.store.open_state()
        try:
            run.state = DeviceState(run.vm, run.plan.kind, fd)
        finally:
            os.close(fd)


def stop(run: Run) -> None:
    """Stop the guest."""
    run.stop_guest()


def state(run: Run) -> None:
    """Have QEMU begin to write the device state. ``verify`` waits until it is written."""
    run.state.begin()


def verify(run: Run) -> None:
    """Read the guest's free lists while QEMU writes: QEMU does not change page structures."""
    run.free, run.verification = _free(run)
    run.state.wait()


def _free(run: Run) -> tuple[FreeMemory | None, str]:
    """Return the free pages, or None and why they are not known.

    After a reset the memory may still hold the page structures of the previous kernel.  They would
    verify perfectly yet describe a dead kernel, so they are refused.
    """
    try:
        if run.vm.count_events("RESET"):
            raise VerificationRefused("the machine was reset meanwhile")
        if run.free_memory is not None:
            return run.free_memory(run.source), ""
        return run.source.free_memory(), ""
    except VerificationRefused as error:
        return None, str(error)


def copy(run: Run) -> None:
    """Copy all data of guest memory except its free pages."""
    run.wanted, holes, verified = [], 0, 0
    for _, file in run.plan.memory:
        data = ext.data_extents(file.fd, file.size)
        wanted = data
        if run.free is not None:
            wanted = data - ext.to_file(run.free.ranges, file.regions)
        holes += file.size - data.total
        verified += data.total - wanted.total
        run.wanted.append(wanted)
    run.store.expect(sum(wanted.total for wanted in run.wanted))
    run.copied = Copied(copy_extents(run), {"holes": holes, "verified": verified})


def copy_extents(run: Run) -> list[int]:
    """Copy ``run.wanted`` of each file. Return the bytes copied of each."""
    run.observer.size(sum(wanted.total for wanted in run.wanted))
    return [
        run.store.copy(
            index, ram_name(memdev.id), file.fd, file.size, run.wanted[index], run.observer.copied
        )
        for index, (memdev, file) in enumerate(run.plan.memory)
    ]


def check(run: Run) -> None:
    """Raise UsageError if somebody else has resumed the guest while it was copied."""
    status = run.vm.status()
    if status == "running" or run.vm.count_events("RESUME") != run.resumes:
        raise UsageError(
            "somebody else has resumed the guest while it was saved, so the copy is not of one "
            "moment; it is discarded"
        )


def resume(run: Run) -> None:
    """Resume the guest: everything is copied."""
    run.resume_guest()


def plug(run: Run) -> None:
    """Plug the balloon in again and leave QEMU as it was."""
    with run.journal.undoing("migrate"):
        run.state.put_away()
    _check_unchanged(run)
    with run.journal.undoing("unplug"):
        device.plug(run.vm, run.plan.device.arguments, run.plan.device.chardev)


def _check_unchanged(run: Run) -> None:
    """Raise UsageError if the machine has gained or lost memory since ``look``.

    QEMU does not save the memory of any shared memory backend, so the plan must know all of them.
    Asking after the guest was resumed is enough: what was there when it stopped still is.
    """
    if run.vm.memdevs() != run.plan.memdevs:
        raise UsageError("the machine's memory backends changed meanwhile; try again")


def finish(run: Run) -> None:
    """Compute the checksums, sync everything to disk, and write the manifest last."""
    if run.options.quit:
        _check_unchanged(run)
    run.manifest = _manifest(run)
    run.store.finish(run.manifest)


def hand_over(run: Run) -> None:
    """Make the snapshot the machine: from now on QEMU is only to end."""
    check(run)
    run.journal.write(over=True)


def offer(run: Run) -> None:
    """Wait until the destination has the snapshot complete, checked and on its disk."""
    assert run.sender is not None
    run.sender.wait_verified()
    check(run)


def commit(run: Run) -> None:
    """Write *gone* into the journal, send COMMIT, and wait until the guest runs over there."""
    assert run.sender is not None
    with run.journal.doing(gone=True):
        run.sender.commit()


def _manifest(run: Run) -> SnapshotManifest:
    plan = run.plan
    if plan.kind is StateKind.DEVICES_ONLY:
        run.store.change_state(lambda state: as_migration(state, plan.qemu["machine"]))
    state_bytes, state_digest, digests = run.store.digests()
    return SnapshotManifest(
        created_ns=run.stopped_ns,
        qemu=plan.qemu,
        state=StateFile(plan.kind, state_bytes, state_digest),
        memory=tuple(
            MemoryFile(memdev.id, ram_name(memdev.id), file.size, size, digest)
            for (memdev, file), size, digest in zip(
                plan.memory, run.copied.sizes, digests, strict=True
            )
        ),
        left_out=run.copied.left_out,
        verification=run.verification,
        balloon={
            "device": plan.device.arguments,
            "chardev": plan.device.chardev,
            "target": run.source.target,
        },
        extra={"seconds": run.seconds()},
    )


def end(run: Run) -> None:
    """End QEMU. The machine must never run both here and from the snapshot."""
    end_qemu(run.vm)
    run.journal.clear()
