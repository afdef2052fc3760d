# SPDX-License-Identifier: Apache-2.0
"""Have QEMU write its device state without guest memory.

Every QEMU has two ways.  ``migrate`` with ``x-ignore-shared`` leaves out shared memory of
``memory-backend-file`` and nothing else.  It does not leave out a memfd, which has no name; then
``xen-save-devices-state`` writes the devices and no RAM at all.  That is complete if all other RAM
is firmware, which every QEMU loads itself.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vballoon.errors import UsageError
from vballoon_spec.snapshot import StateKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vballoon.snapshot.qmp_vm import Memdev, QemuVm

__all__ = (
    "CAPABILITY",
    "DeviceState",
    "as_migration",
    "choose_kind",
    "ignores_shared",
    "migration_over",
    "set_ignore_shared",
)

CAPABILITY = "x-ignore-shared"
STREAM_HEAD = b"QEVM" + (3).to_bytes(4, "big")
CONFIGURATION, DESCRIPTION = b"\x07", b"\x06"
"""Magic and version of a migration stream, and the types of two of its sections."""
MIGRATION_SECONDS = 60.0
"""Device state is a few hundred kilobytes; taking longer than this is a fault."""
_FOREIGN = {
    "background-snapshot",
    "mapped-ram",
    "multifd",
    "pause-before-switchover",
    "postcopy-ram",
    "x-colo",
}
"""Capabilities that may be set for another kind of migration, and change the stream."""
_RUNNING = {"setup", "active", "device", "cancelling", "wait-unplug", "pre-switchover"}


def choose_kind(vm: QemuVm, memdevs: Sequence[Memdev]) -> StateKind:
    """Return how this machine's state can be saved. Raise UsageError where no way is complete.

    *memdevs* are the memory backends that the snapshot copies.
    """
    if all(memdev.path for memdev in memdevs):
        if strange := sorted(_capabilities(vm) & _FOREIGN):
            raise UsageError(
                f"restore could not read a state that QEMU writes with {strange[0]} on"
            )
        return StateKind.IGNORE_SHARED
    ours = {memdev.id for memdev in memdevs}
    others = [b.name for b in vm.ram_blocks() if b.name not in ours and not b.read_only]
    if others:
        raise UsageError(
            f"QEMU leaves a memfd out of its state only together with all RAM, and {others[0]} is "
            "needed; use memory-backend-file (with a mem-path in /dev/shm, say) instead"
        )
    return StateKind.DEVICES_ONLY


def ignores_shared(vm: QemuVm) -> bool:
    """Return whether the capability is set."""
    return CAPABILITY in _capabilities(vm)


def _capabilities(vm: QemuVm) -> set[str]:
    """Return the migration capabilities that are on."""
    entries = vm.execute("query-migrate-capabilities")
    return {str(entry["capability"]) for entry in entries if entry["state"]}


def set_ignore_shared(vm: QemuVm, on: bool) -> bool:
    """Set the capability. Return what it was."""
    before = ignores_shared(vm)
    if before != on:
        capability = {"capability": CAPABILITY, "state": on}
        vm.execute("migrate-set-capabilities", capabilities=[capability])
    return before


class DeviceState:
    """The machine's device state, to be written to *fd*, which is open for writing only.

    Make it while the guest runs, so that the guest is stopped only for the writing.  Call
    :meth:`begin` when the guest is stopped, :meth:`wait` before reading or changing anything but
    the guest's page structures, and :meth:`put_away` at the end.
    """

    def __init__(self, vm: QemuVm, kind: StateKind, fd: int) -> None:
        self._vm, self._kind = vm, kind
        self._number = vm.send_fd(fd)
        self._path = f"/dev/fdset/{self._number}"
        self._before = kind is StateKind.IGNORE_SHARED and set_ignore_shared(vm, True)
        if kind is StateKind.DEVICES_ONLY:
            _require_migratable(vm)  # its command does not ask

    def begin(self) -> None:
        """Have QEMU begin to write. With ``migrate``, return before it has finished."""
        if self._kind is StateKind.DEVICES_ONLY:
            self._vm.execute("xen-save-devices-state", filename=self._path)
        else:
            self._vm.execute("migrate", uri=f"file:{self._path}")

    def wait(self) -> None:
        """Wait until all is written. Raise :class:`~vballoon.errors.UsageError` where it fails."""
        if self._kind is StateKind.DEVICES_ONLY:
            return
        status = migration_over(self._vm, MIGRATION_SECONDS)
        if status != "completed":
            words = self._vm.execute("query-migrate").get("error-desc", status)
            raise UsageError(f"QEMU could not save the device state: {words}")

    def put_away(self) -> None:
        """Restore the capability and remove the descriptor set."""
        if self._kind is StateKind.IGNORE_SHARED:
            set_ignore_shared(self._vm, self._before)
        self._vm.execute("remove-fd", **{"fdset-id": self._number})


def as_migration(state: bytes, machine: str) -> bytes:
    """Return the output of ``xen-save-devices-state`` as the stream of a migration of *machine*.

    That output lacks the section with the machine's type and the description at the end.  QEMU can
    be configured not to expect the first (``send-configuration=off``), but then it never sends it
    either, and QEMU 11.1 aborts on a failed assertion when it is migrated later.
    """
    if state[:8] != STREAM_HEAD or state[8:9] == CONFIGURATION:
        raise UsageError("QEMU wrote its device state in an unknown format")
    name = machine.encode()
    configuration = CONFIGURATION + len(name).to_bytes(4, "big") + name
    description = DESCRIPTION + (2).to_bytes(4, "big") + b"{}"
    return state[:8] + configuration + state[8:] + description


def _require_migratable(vm: QemuVm) -> None:
    reasons = vm.execute("query-migrate").get("blocked-reasons")
    if reasons:
        raise UsageError(f"QEMU cannot save this machine: {'; '.join(map(str, reasons))}")


def migration_over(vm: QemuVm, timeout: float) -> str:
    """Wait until no migration runs. Cancel one that takes longer than *timeout* seconds.

    Return its status.
    """
    deadline = time.monotonic() + timeout
    pause = 0.001
    while (status := str(vm.execute("query-migrate").get("status", "none"))) in _RUNNING:
        if time.monotonic() > deadline:
            vm.execute("migrate_cancel")
            deadline += timeout
        time.sleep(pause)
        pause = min(pause * 2, 0.1)
    return status
