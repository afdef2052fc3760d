# SPDX-License-Identifier: Apache-2.0
"""A real QEMU with a real Linux in it, for the length of a ``with`` block."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.lab import initramfs, qemu
from tests.lab.agent import Guest
from tests.lab.cache import LabError
from tests.lab.guestkernels import Kernel, kernel
from tests.lab.qmp import Qmp
from tests.lab.ram import Ram, memfds

PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """Run in the child: be killed when the thread that started it ends, so no QEMU outlives its
    test.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Machine:
    """A QEMU process, its guest's agent, its monitor and its memory.

    ``Machine(kernel="6.1", machine="pc", memory=1024, extra=[...])`` takes the fields of
    :class:`~tests.lab.qemu.Config`, and ``files``/``binaries`` as
    :func:`~tests.lab.initramfs.overlay` does. ``with`` starts it and waits for the agent; at the
    end it is killed. A test that starts a VM to load a saved state into passes ``incoming`` and
    calls no agent until it has resumed.
    """

    def __init__(
        self,
        *,
        files: Mapping[str, bytes | Path] | None = None,
        binaries: Sequence[str] = (),
        incoming: str | None = None,
        config: qemu.Config | None = None,
        **hardware: Any,
    ) -> None:
        self.config = config or qemu.Config(**hardware)
        self.kernel: Kernel = kernel(self.config.kernel)
        self.folder = Path(tempfile.mkdtemp(prefix="lab-", dir=_scratch(self.config)))
        self._files, self._binaries, self._incoming = dict(files or {}), binaries, incoming
        self._process: subprocess.Popen[bytes] | None = None
        self._guest: Guest | None = None
        self._qmp: Qmp | None = None
        self.boot_seconds = 0.0

    def __enter__(self) -> Machine:
        try:
            self.start()
            if self._incoming is None:
                self.wait_until_up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def command(self) -> list[str]:
        """Return the whole command line."""
        accel = self.config.accel or qemu.accelerator()
        arguments = qemu.arguments(
            self.config, self.folder, self.kernel.image, self._initrd(), accel
        )
        incoming = ["-incoming", self._incoming] if self._incoming else []
        return [*qemu.program(), *arguments, *incoming]

    def _initrd(self) -> Path:
        base = initramfs.base(self.kernel)
        if not (self._files or self._binaries):
            return base
        path = self.folder / "initramfs"
        path.write_bytes(base.read_bytes() + initramfs.overlay(self._files, self._binaries))
        return path

    def start(self) -> None:
        """Start QEMU and connect to its monitor and to the script channel."""
        command = self.command()
        self._started = time.monotonic()
        with open(self.folder / "qemu.log", "wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=qemu.environment(),
                preexec_fn=_die_with_parent,
            )
        self._qmp = Qmp(self._socket("qmp.sock"))
        self._guest = Guest(self._socket("agent.sock"), self.obituary)

    def _socket(self, name: str) -> Path:
        path = self.folder / name
        deadline = time.monotonic() + 30
        while not path.exists():
            if (words := self.obituary()) or time.monotonic() > deadline:
                raise LabError(f"QEMU did not start: {words or 'no ' + name}")
            time.sleep(0.02)
        return path

    def wait_until_up(self, timeout: float = 120) -> None:
        """Wait for the agent of a guest that starts (again)."""
        try:
            self.guest.wait_until_up(timeout)
        except LabError as error:
            raise LabError(f"{error}\nconsole:\n{self.console()[-3000:]}") from None
        self.boot_seconds = time.monotonic() - self._started

    def reboot(self) -> None:
        """Start the guest again, without a shutdown, and wait for it; needs ``reboot=True``."""
        self._started = time.monotonic()
        self.guest.post("echo b >/proc/sysrq-trigger")
        self.wait_until_up()

    def close(self) -> None:
        """Kill QEMU, reap it and remove what it left; may be called twice."""
        for end in (self._guest, self._qmp):
            if end is not None:
                end.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def quit(self, timeout: float = 30) -> int:
        """Have QEMU end by itself (QMP ``quit``); its exit status."""
        self.qmp("quit")
        return self.process.wait(timeout)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The QEMU process."""
        if self._process is None:
            raise LabError("the machine was not started")
        return self._process

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self.process.pid

    @property
    def guest(self) -> Guest:
        """The guest's agent."""
        if self._guest is None:
            raise LabError("the machine was not started")
        return self._guest

    @property
    def monitor(self) -> Qmp:
        """The monitor, for its events."""
        if self._qmp is None:
            raise LabError("the machine was not started")
        return self._qmp

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a monitor command (underscores in argument names become dashes) and give its return
        value.
        """
        return self.monitor.command(command, **arguments)

    @property
    def qmp_socket(self) -> Path:
        """A second monitor's socket, for a program under test (the lab itself holds the first)."""
        return self.folder / "qmp2.sock"

    @property
    def ram(self) -> list[Ram]:
        """The guest's memory backings, one per NUMA node."""
        nodes = range(self.config.nodes)
        if self.config.backing != "file":
            return [Ram(path) for path in memfds(self.pid)]
        return [Ram(self.config.ram_path or self.folder / f"ram{node}") for node in nodes]

    def resident(self) -> int:
        """Bytes of host memory that the guest's RAM occupies."""
        return sum(ram.resident() for ram in self.ram)

    def obituary(self) -> str | None:
        """Why QEMU is gone, in its own words; None while it lives."""
        if self._process is None or self._process.poll() is None:
            return None
        words = (self.folder / "qemu.log").read_text(errors="replace").strip()
        return f"QEMU ended with {self._process.returncode}: {words[-2000:]}"

    def console(self) -> str:
        """Return what the guest's kernel printed so far."""
        path = self.folder / "console.log"
        return path.read_text(errors="replace") if path.exists() else ""


def _scratch(config: qemu.Config) -> str | None:
    """Return a folder on tmpfs if the RAM is a file in it."""
    return "/dev/shm" if config.backing == "file" and os.path.isdir("/dev/shm") else None
