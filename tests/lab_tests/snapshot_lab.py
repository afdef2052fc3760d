# SPDX-License-Identifier: Apache-2.0
"""A guest with known data, ``vballoon snapshot`` and ``restore`` as programs, and checks."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.lab import Machine, build_module
from tests.lab.backend import Backend, negotiated, wait_until

VBALLOON = [sys.executable, "-m", "vballoon"]
DRIVER = Path(__file__).resolve().parents[2] / "driver_kmod"
MIB = 1 << 20


def guest_module(kernel: str, folder: Path) -> Path:
    """Return the guest module for *kernel*."""
    return build_module(kernel, DRIVER, folder / f"kmod-{kernel}").modules[0]


@contextmanager
def balloon_guest(
    backend: Backend, *, module: Path | None = None, machine: str = "q35", **hardware: Any
) -> Iterator[Machine]:
    """Boot a guest with the balloon ``backend`` and the guest module or the stock driver."""
    files: dict[str, bytes | Path] = {"lab/vballoon_walk.ko": module} if module else {}
    extra = [*hardware.pop("extra", []), *backend.device(machine)]
    with Machine(machine=machine, files=files, extra=extra, **hardware) as vm:
        load_driver(vm, module)
        wait_until(lambda: negotiated(backend))
        yield vm


def load_driver(vm: Machine, module: Path | None) -> None:
    if module is None:
        vm.guest.load("virtio_balloon")
    else:
        vm.guest.load("virtio_pci")
        vm.guest.sh("insmod /lab/vballoon_walk.ko")


def fill(vm: Machine, freed: int) -> None:
    """Create known data in files and in a process, and *freed* MiB of old data in free memory."""
    vm.guest.sh("keeper make /tmp/kept 40")
    vm.guest.start("memhog 60", log="/run/hog.log", fifo="/run/hog")
    vm.guest.wait_for("grep -q filled /run/hog.log")
    vm.guest.sh(f"memhog {freed} </dev/null >/dev/null", timeout=200)


def unharmed(vm: Machine) -> None:
    """Check that all known data is unchanged."""
    assert vm.guest.sh("keeper check /tmp/kept").startswith("good")
    before = int(vm.guest.sh("wc -l </run/hog.log"))
    vm.guest.sh("echo check >/run/hog")
    vm.guest.wait_for(f"test $(wc -l </run/hog.log) -gt {before}")
    assert vm.guest.sh("tail -n 1 /run/hog.log") == "good"


def snapshot(
    vm: Machine, backend: Backend, directory: Path, *options: str, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run ``vballoon snapshot``."""
    command = [
        *VBALLOON, "snapshot", "--qmp", str(vm.qmp_socket),
        "--control", str(backend.control_socket), *options, str(directory),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


class RestoredMachine(Machine):
    """The machine of *original*, run by ``vballoon restore`` from *directory*."""

    def __init__(self, original: Machine, directory: Path, *options: str) -> None:
        super().__init__(config=original.config, files=original._files)
        self._words = [*VBALLOON, "restore", str(directory), *options, "--"]

    def standard_input(self, path: Path) -> None:
        """Have the program read *path*."""
        self._words = ["sh", "-c", 'exec "$@" <"$0"', str(path), *self._words]

    def command(self) -> list[str]:
        return [*self._words, *super().command()]

    def __enter__(self) -> RestoredMachine:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        if self._qmp is not None and self.process.poll() is None:
            try:
                self.qmp("quit")
                self.process.wait(10)
            except Exception:  # QEMU has ended already, or will end with its parent
                pass
        super().close()

    def words(self) -> str:
        return (self.folder / "qemu.log").read_text(errors="replace")


def reporting_is_quiet(backend: Backend, seconds: float = 3.0) -> None:
    """Wait until the guest reports no more pages for *seconds*."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < seconds:
        now = backend.ctl("query-skip-bitmap")["pages"]["reported"]
        if now != last:
            last, since = now, time.monotonic()
        time.sleep(0.2)


def balloon_works(vm: Machine, backend: Backend, memory: int) -> None:
    """Check that the guest has its balloon and that it inflates."""
    wait_until(lambda: negotiated(backend), timeout=30)
    backend.ctl("balloon", value=(memory - 64) * MIB)
    wait_until(lambda: backend.ctl("query-balloon")["actual"] <= (memory - 64) * MIB, timeout=30)
    backend.ctl("balloon", value=memory * MIB)
    wait_until(lambda: backend.ctl("query-balloon")["actual"] >= (memory - 1) * MIB, timeout=30)


def words_of(results: Sequence[subprocess.CompletedProcess[str]]) -> str:
    return "\n".join(r.stderr for r in results)
