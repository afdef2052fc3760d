# SPDX-License-Identifier: Apache-2.0
"""QEMU's device state without the guest's memory, written by QEMU itself.

Two ways, both in every QEMU.  ``migrate`` with ``x-ignore-shared`` leaves out shared memory of
``memory-backend-file`` and nothing else.  It does not leave out a memfd, which has no name; then
``xen-save-devices-state`` writes the devices and no RAM at all, which is the whole truth as long as
all other RAM is firmware that each QEMU loads anew.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vballoon.errors import UsageError
from vballoon_spec.snapshot import StateKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vballoon.snapshot.qmp_vm import Memdev, QemuVm

__all__ = ("CAPABILITY", "choose_kind", "migration_over", "save_state", "set_ignore_shared")

CAPABILITY = "x-ignore-shared"
MIGRATION_SECONDS = 60.0
"""Device state is a few hundred kilobytes; longer than this is a fault."""
_RUNNING = {"setup", "active", "device", "cancelling", "wait-unplug", "pre-switchover"}


def choose_kind(vm: QemuVm, memdevs: Sequence[Memdev]) -> StateKind:
    """How this machine's state can be had; UsageError where no way is complete.

    *memdevs* are the backends whose memory is copied by us.
    """
    if all(memdev.path for memdev in memdevs):
        return StateKind.IGNORE_SHARED
    ours = {memdev.id for memdev in memdevs}
    others = [b.name for b in vm.ram_blocks() if b.name not in ours and not b.read_only]
    if others:
        raise UsageError(
            f"QEMU leaves a memfd out of its state only together with all RAM, and {others[0]} is "
            "needed; use memory-backend-file (with a mem-path in /dev/shm, say) instead"
        )
    return StateKind.DEVICES_ONLY


def set_ignore_shared(vm: QemuVm, on: bool) -> bool:
    """Set the capability; returns what it was."""
    before = any(
        entry["capability"] == CAPABILITY and entry["state"]
        for entry in vm.execute("query-migrate-capabilities")
    )
    if before != on:
        capability = {"capability": CAPABILITY, "state": on}
        vm.execute("migrate-set-capabilities", capabilities=[capability])
    return before


def save_state(vm: QemuVm, kind: StateKind, fd: int) -> None:
    """Have the stopped machine's state written to *fd*, open for writing only."""
    number = vm.send_fd(fd)
    path = f"/dev/fdset/{number}"
    try:
        if kind is StateKind.DEVICES_ONLY:
            _require_migratable(vm)  # this command does not ask
            vm.execute("xen-save-devices-state", filename=path)
        else:
            _migrate(vm, path)
    finally:
        vm.execute("remove-fd", **{"fdset-id": number})


def _require_migratable(vm: QemuVm) -> None:
    reasons = vm.execute("query-migrate").get("blocked-reasons")
    if reasons:
        raise UsageError(f"QEMU cannot save this machine: {'; '.join(map(str, reasons))}")


def _migrate(vm: QemuVm, path: str) -> None:
    before = set_ignore_shared(vm, True)
    try:
        vm.execute("migrate", uri=f"file:{path}")
        status = migration_over(vm, MIGRATION_SECONDS)
    finally:
        set_ignore_shared(vm, before)
    if status != "completed":
        words = vm.execute("query-migrate").get("error-desc", status)
        raise UsageError(f"QEMU could not save the device state: {words}")


def migration_over(vm: QemuVm, timeout: float) -> str:
    """Wait until no migration runs; one that takes longer than *timeout* s is cancelled."""
    deadline = time.monotonic() + timeout
    pause = 0.001
    while (status := str(vm.execute("query-migrate").get("status", "none"))) in _RUNNING:
        if time.monotonic() > deadline:
            vm.execute("migrate_cancel")
            deadline += timeout
        time.sleep(pause)
        pause = min(pause * 2, 0.1)
    return status
