# SPDX-License-Identifier: Apache-2.0
"""Restore a snapshot as a running machine."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vballoon.errors import UsageError
from vballoon.snapshot.command import incoming_words, memory_words, rewrite
from vballoon.snapshot.copy import copy_extents
from vballoon.snapshot.device import require_balloon
from vballoon.snapshot.extents import data_extents
from vballoon.snapshot.qmp_vm import QemuVm
from vballoon.snapshot.state import CAPABILITY, set_ignore_shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vballoon_spec.snapshot import SnapshotManifest

__all__ = (
    "RamPlace",
    "Restored",
    "balloon_arguments",
    "printed_arguments",
    "printed_commands",
    "start",
)

START_SECONDS = 30.0
LOAD_SECONDS = 60.0
"""How long QEMU may take to open its monitor, and to load the state."""


@dataclass(slots=True)
class RamPlace:
    """Files for guest memory, filled from a snapshot, in *folder*.

    QEMU has the files open, so their names are removed as soon as it runs.
    """

    folder: Path
    files: dict[str, Path] = field(default_factory=dict)

    def fill(self, snapshot: Path, manifest: SnapshotManifest) -> None:
        """Copy all memory. Raise :class:`~vballoon.errors.UsageError`."""
        mark = secrets.token_hex(4)
        for memory in manifest.memory:
            path = self.folder / f"vballoon-{mark}-{memory.file}"
            try:
                self._fill(snapshot / memory.file, path, memory.id)
            except OSError as error:
                raise UsageError(f"{path}: {error.strerror}") from None

    def use(self, snapshot: Path, manifest: SnapshotManifest) -> None:
        """Use the snapshot's own files, which the guest then overwrites."""
        self.files = {memory.id: snapshot / memory.file for memory in manifest.memory}

    def keep(self) -> None:
        """Keep the names: the caller uses and removes them."""
        self.files = {}

    def _fill(self, source: Path, path: Path, ident: str) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with source.open("rb") as file:
            target = os.open(path, flags, 0o600)
            self.files[ident] = path
            try:
                size = os.fstat(file.fileno()).st_size
                os.ftruncate(target, size)
                copy_extents(file.fileno(), target, data_extents(file.fileno(), size))
            finally:
                os.close(target)

    def remove(self) -> None:
        """Remove the names."""
        for path in self.files.values():
            path.unlink(missing_ok=True)
        self.files = {}


def balloon_arguments(
    manifest: SnapshotManifest, socket: str | None
) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Return the ``device_add`` arguments and the chardev of the balloon.

    *socket*: the back-end's socket, if it differs from the saved one.  Raise
    :class:`~vballoon.errors.UsageError` where the snapshot names anything but a balloon.
    """
    device, chardev = dict(manifest.balloon["device"]), manifest.balloon["chardev"]
    require_balloon(device)
    if "chardev" in device and chardev is None and socket is None:
        raise UsageError(
            "the snapshot does not have its balloon's socket; give it with --balloon-socket"
        )
    if socket is not None:
        if "socket" in device:
            device["socket"] = {"type": "unix", "path": socket}
        else:
            chardev = {"id": device["chardev"], "path": socket}
    return device, chardev


def printed_arguments(
    snapshot: Path, manifest: SnapshotManifest, ram: dict[str, Path]
) -> list[str]:
    """Return QEMU arguments that replace the memory backends and load the state."""
    words: list[str] = []
    for value in memory_words(manifest, ram, {}).values():
        words += ["-object", value]
    return words + incoming_words(manifest, snapshot.resolve() / manifest.state.file)


def printed_commands(device: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the QMP commands to be sent when the state is loaded."""
    off = {"capabilities": [{"capability": CAPABILITY, "state": False}]}
    return [
        {"execute": "migrate-set-capabilities", "arguments": off},
        {"execute": "cont"},
        {"execute": "device_add", "arguments": device},
    ]


@dataclass(slots=True)
class Restored:
    """A started QEMU: its process, and a monitor that only we use."""

    process: subprocess.Popen[bytes]
    vm: QemuVm

    def load(self, manifest: SnapshotManifest) -> None:
        """Wait until the state is loaded, then resume the guest."""
        deadline = time.monotonic() + LOAD_SECONDS
        while (status := self.vm.status()) == "inmigrate":
            if time.monotonic() > deadline:
                raise UsageError(f"QEMU does not load the state within {LOAD_SECONDS:g} s")
            time.sleep(0.005)
        machine = str(self.vm.execute("qom-get", path="/machine", property="type"))
        if machine.removesuffix("-machine") != manifest.qemu["machine"]:
            raise UsageError(f"the state is of a {manifest.qemu['machine']}, this is a {machine}")
        migration = self.vm.execute("query-migrate")
        if migration.get("status") != "completed":
            raise UsageError(f"QEMU did not load the state: {migration}")
        # Otherwise a later migration of this machine would leave out all memory.
        set_ignore_shared(self.vm, False)
        if status != "running":
            self.vm.execute("cont")


@contextlib.contextmanager
def start(
    words: Sequence[str], snapshot: Path, manifest: SnapshotManifest, ram: dict[str, Path]
) -> Any:
    """Run the machine's command line so that it restores *snapshot*. Yield a Restored.

    On an error, kill the process.  Raise :class:`~vballoon.errors.UsageError`.
    """
    command = rewrite(words, manifest, ram, snapshot.resolve() / manifest.state.file)
    with tempfile.TemporaryDirectory(prefix="vballoon-") as folder:
        monitor = Path(folder) / "qmp"
        command += ["-qmp", f"unix:{monitor},server=on,wait=off"]
        try:
            process = subprocess.Popen(command)
        except OSError as error:
            raise UsageError(f"{command[0]}: {error.strerror}") from None
        try:
            with _connect(monitor, process) as vm:
                yield Restored(process, vm)
        except BaseException:
            process.kill()
            process.wait()
            raise


def _connect(path: Path, process: subprocess.Popen[bytes]) -> QemuVm:
    deadline = time.monotonic() + START_SECONDS
    while True:
        if process.poll() is not None:
            raise UsageError(f"QEMU ended with status {process.returncode}")
        if path.exists():
            with contextlib.suppress(UsageError):
                return QemuVm(path)
        if time.monotonic() > deadline:
            raise UsageError(f"QEMU does not open its monitor within {START_SECONDS:g} s")
        time.sleep(0.01)
