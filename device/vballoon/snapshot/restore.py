# SPDX-License-Identifier: Apache-2.0
"""Restore a snapshot as a running machine."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from vballoon.errors import UsageError
from vballoon.snapshot.command import incoming_words, memory_words, rewrite
from vballoon.snapshot.copy import SparseHash, fill
from vballoon.snapshot.device import require_balloon
from vballoon.snapshot.qmp_vm import QemuVm
from vballoon.snapshot.state import CAPABILITY, set_ignore_shared
from vballoon.snapshot.store import open_plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vballoon_spec.snapshot import SnapshotManifest

__all__ = (
    "RamPlace",
    "Restored",
    "balloon_arguments",
    "printed_arguments",
    "printed_commands",
    "start",
)

DEFAULT_FOLDER = Path("/dev/shm")
"""Stands for memory without a file system: a memfd is used."""
START_SECONDS = 30.0
LOAD_SECONDS = 60.0
"""How long QEMU may take to open its monitor, and to load the state."""


@dataclass(slots=True)
class RamPlace:
    """Files for guest memory, filled from a snapshot, in *folder*.

    Anonymous files are passed to QEMU as descriptors, ``fds``, so that nothing is left when any
    process dies.  Others have names, for a QEMU that somebody else starts.
    """

    folder: Path
    anonymous: bool = True
    files: dict[str, Path] = field(default_factory=dict)
    fds: list[int] = field(default_factory=list)

    def fill(self, snapshot: Path, manifest: SnapshotManifest, *, verify: bool = True) -> None:
        """Copy all memory, and check its checksums on the way unless *verify* is off.

        Raise :class:`~vballoon.errors.UsageError`.
        """
        mark = secrets.token_hex(4)
        for memory in manifest.memory:
            path = self.folder / f"vballoon-{mark}-{memory.file}"
            try:
                with open_plain(snapshot / memory.file) as file:
                    digest = SparseHash(memory.size) if verify else None
                    fill(file.fileno(), self._create(path, memory.id), digest)
            except OSError as error:
                raise UsageError(f"{path}: {error.strerror}") from None
            if digest is not None and digest.hexdigest() != memory.sha256:
                raise UsageError(f"{snapshot / memory.file} differs from the manifest")

    def use(self, snapshot: Path, manifest: SnapshotManifest) -> None:
        """Use the snapshot's own files, which the guest then overwrites unless it is private."""
        self.files = {memory.id: snapshot.resolve() / memory.file for memory in manifest.memory}
        self.anonymous = False

    def keep(self) -> None:
        """Keep the names: the caller uses and removes them."""
        self.files = {}

    def _create(self, path: Path, ident: str) -> int:
        """Return a new file, which this object closes."""
        if not self.anonymous:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self.files[ident] = path
            self.fds.append(fd)
            return fd
        fd = _anonymous_file(path)
        self.files[ident] = Path(f"/proc/self/fd/{fd}")
        self.fds.append(fd)
        return fd

    def remove(self) -> None:
        """Remove the names and close the descriptors."""
        if not self.anonymous:
            for path in self.files.values():
                path.unlink(missing_ok=True)
        self.files = {}
        for fd in self.fds:
            os.close(fd)
        self.fds = []


def _anonymous_file(path: Path) -> int:
    """Return a new file without a name, on the file system where *path* would be."""
    if path.parent == DEFAULT_FOLDER:
        return os.memfd_create("vballoon-ram", os.MFD_CLOEXEC)
    try:
        return os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    path.unlink()
    return fd


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
    warden: Warden

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
        self.warden.dismiss()


@contextlib.contextmanager
def start(
    words: Sequence[str],
    snapshot: Path,
    manifest: SnapshotManifest,
    place: RamPlace,
    *,
    private: bool = False,
) -> Any:
    """Run the machine's command line so that it restores *snapshot*. Yield a Restored.

    On an error, and when this process dies before the guest runs, kill QEMU.  Pass SIGTERM and
    SIGHUP on to it.  Raise :class:`~vballoon.errors.UsageError`.
    """
    state = snapshot.resolve() / manifest.state.file
    command = rewrite(words, manifest, place.files, state, private=private)
    with tempfile.TemporaryDirectory(prefix="vballoon-") as folder, Warden() as warden:
        monitor = Path(folder) / "qmp"
        command += ["-qmp", f"unix:{monitor},server=on,wait=off"]
        fds = place.fds if place.anonymous else ()
        try:
            process = subprocess.Popen(command, pass_fds=fds)
        except OSError as error:
            raise UsageError(f"{command[0]}: {error.strerror}") from None
        warden.watch(process.pid)
        with signals_to(process):
            try:
                with _connect(monitor, process) as vm:
                    yield Restored(process, vm, warden)
            except BaseException:
                process.kill()
                process.wait()
                raise


@contextlib.contextmanager
def signals_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass SIGTERM and SIGHUP on to *process* inside the body. SIGINT reaches it by itself."""

    def pass_on(number: int, _: object) -> None:
        process.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Warden:
    """A process that kills QEMU if this process dies before the guest runs. A context manager."""

    PROGRAM = (
        "import os, signal, sys\n"
        "pid = sys.stdin.readline()\n"
        "fd = os.pidfd_open(int(pid)) if pid else -1\n"
        "if fd >= 0 and not sys.stdin.readline(): signal.pidfd_send_signal(fd, signal.SIGKILL)\n"
    )

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", self.PROGRAM],
            stdin=subprocess.PIPE,
            start_new_session=True,  # the terminal's signals are not meant for it
        )

    def _write(self, text: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()

    def watch(self, pid: int) -> None:
        """Kill process *pid* when this process dies."""
        self._write(f"{pid}\n")

    def dismiss(self) -> None:
        """Let the process live: the guest runs."""
        self._write("runs\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


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
