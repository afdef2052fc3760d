# SPDX-License-Identifier: Apache-2.0
"""A ``vballoon serve`` process of its own, and the QEMU arguments that attach a guest to it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.lab.machine import Machine, _die_with_parent
from tests.lab.qmp import Qmp

from vballoon.control import ControlClient

TRANSPORTS = ("vhost-user", "vfio-user")
ROLES = 6
"""Number of queues of the front-end: five of the standard, and the walk queue."""


class Backend:
    """``with Backend("vhost-user") as b``: a server process; ``b.ctl("query-status")`` asks it."""

    def __init__(self, transport: str, *options: str, config_size: int = 24) -> None:
        self.transport = transport
        self.folder = Path(tempfile.mkdtemp(prefix="vballoon-"))
        self.socket = self.folder / "device.sock"
        self.control_socket = self.folder / "control.sock"
        self.log = self.folder / "serve.log"
        self.options = options
        self.config_size = config_size
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Qmp | None = None

    def __enter__(self) -> Backend:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if kind is None:
            assert "Traceback" not in self.words(), self.words()

    def command(self) -> list[str]:
        """Return the command line of the server."""
        return [
            sys.executable, "-m", "vballoon", "serve",
            f"--{self.transport}", str(self.socket),
            "--control", str(self.control_socket), "--folder", tempfile.gettempdir(),
            *self.options,
        ]  # fmt: skip

    def start(self) -> None:
        """Start the server and connect to its control socket."""
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,
            )
        deadline = time.monotonic() + 20
        while not (self.socket.exists() and self.control_socket.exists()):
            assert self._process.poll() is None, f"vballoon serve ended: {self.words()}"
            assert time.monotonic() < deadline, f"vballoon serve does not listen: {self.words()}"
            time.sleep(0.01)
        self._control = Qmp(self.control_socket)

    def close(self) -> None:
        """Stop the server; may be called twice."""
        if self._control is not None:
            self._control.close()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(10)

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def events(self) -> Qmp:
        """The control connection, for its events."""
        assert self._control is not None
        return self._control

    def ctl(self, command: str, **arguments: Any) -> Any:
        """Run a command on the control socket."""
        return self.events.command(command, **arguments)

    def export(self, folder: Path) -> dict[str, int]:
        """Write the skip bitmap to the new *folder*; return its pages by provenance."""
        with ControlClient(self.control_socket, timeout=60) as client:
            return client.export(folder)

    def words(self) -> str:
        """Return the log of the server."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def properties(self, machine: str, port: str, id_: str) -> dict[str, Any]:
        """Return the device's properties for ``device_add`` and ``-device``."""
        bus = {"bus": port} if machine == "q35" else {}
        if self.transport == "vfio-user":
            return {
                "driver": "vfio-user-pci",
                "id": id_,
                "socket": {"type": "unix", "path": str(self.socket)},
                **bus,
            }
        return {
            "driver": "vhost-user-test-device-pci",
            "id": id_,
            "chardev": f"c-{id_}",
            "virtio-id": 5,
            "num_vqs": ROLES,
            "vq_size": 128,
            "config_size": self.config_size,
            **bus,
        }

    def device(self, machine: str, *, port: str = "rp0", id_: str = "balloon0") -> list[str]:
        """Return QEMU arguments that attach this back-end as *id_*, hot-pluggable."""
        device = ["-device", json.dumps(self.properties(machine, port, id_))]
        if self.transport == "vfio-user":
            return device
        return ["-chardev", f"socket,id=c-{id_},path={self.socket}", *device]

    def plug(self, vm: Machine, port: str = "rp0", id_: str = "balloon0") -> None:
        """Attach this back-end to a running machine."""
        if self.transport == "vhost-user":
            address = {"type": "unix", "data": {"path": str(self.socket)}}
            backend = {"type": "socket", "data": {"addr": address, "server": False}}
            vm.qmp("chardev-add", id=f"c-{id_}", backend=backend)
        vm.monitor.execute("device_add", self.properties(vm.config.machine, port, id_))

    def unplug(self, vm: Machine, id_: str = "balloon0") -> None:
        """Take the device out of the guest, and its socket out of QEMU."""
        vm.qmp("device_del", id=id_)
        vm.monitor.wait_event("DEVICE_DELETED", device=id_)
        if self.transport == "vhost-user":
            vm.qmp("chardev-remove", id=f"c-{id_}")


def wait_until(condition: Any, timeout: float = 60, step: float = 0.1) -> Any:
    """Wait until *condition()* is true and give its value; AssertionError after *timeout* s."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(step)


def negotiated(backend: Backend) -> Sequence[str]:
    """Return the names of the features that the driver has accepted."""
    return list(backend.ctl("query-status")["features"])
