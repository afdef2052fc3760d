# SPDX-License-Identifier: Apache-2.0
"""A QEMU monitor for tests, with QMP, a run state, a balloon device and a memory backend."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ("BALLOON", "FakeQemu", "event")

BALLOON = {
    "driver": "vhost-user-test-device-pci",
    "id": "balloon0",
    "bus": "rp0",
    "addr": 0,
    "chardev": "c0",
    "virtio-id": 5,
    "num_vqs": 6,
    "vq_size": 128,
    "config_size": 24,
}
BLOCK = "{name:>30} 4 KiB 0x0000000000000000 0x{size:016x} 0x{size:016x} 0x{host:016x}  {mode}\n"


class Refused(Exception):
    """An error reply."""


class FakeQemu:
    """A monitor that listens at *path*; a context manager.

    ``refuse``: commands that get an error reply; ``on``: called before a command is carried out;
    ``log``: the commands received; ``lets_go``: whether the guest releases an unplugged device.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.size, self.host = size, 0
        self._mapping: mmap.mmap | None = None
        self.status = "running"
        self.device: dict[str, Any] | None = dict(BALLOON)
        self.socket = path.with_name("balloon.sock")
        with socket.socket(socket.AF_UNIX) as backend:
            backend.bind(str(self.socket))
        self.chardevs = {"c0": str(self.socket)}
        self.capability = self.mapped_ram = False
        self.migration: dict[str, Any] = {}
        self.more_memory: list[dict[str, Any]] = []
        self.blocked: list[str] = []
        self.networks = ""
        self.mute = False
        self.dead = False
        self.events: list[dict[str, Any]] = []
        """Sent before the next answer."""
        self.backend_type = "memory-backend-memfd"
        self.backend_path = ""
        self.graphics = False
        self.lets_go = True
        self.refuse: set[str] = set()
        self.on: Callable[[str], None] = lambda name: None
        self.log: list[str] = []
        self._fds: dict[int, int] = {}
        self._received: list[int] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._listener.close()
        for fd in [*self._fds.values(), *self._received]:
            os.close(fd)
        if self._mapping is not None:
            self._mapping.close()

    def map_memory(self, fd: int) -> int:
        """Map *fd* as the guest's memory, as QEMU does. Return the address."""
        if self._mapping is not None:
            self._mapping.close()
        self._mapping = mmap.mmap(fd, self.size)
        self.host = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        return self.host

    @property
    def whole(self) -> bool:
        """Whether the guest runs with its balloon and all settings are as at the start."""
        return (self.status, self.device, self.capability) == ("running", BALLOON, False)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self._talk(connection)
            if self.status == "ended" or self.dead:
                return

    def _talk(self, connection: socket.socket) -> None:
        greeting = {
            "QMP": {
                "version": {"qemu": {"major": 11, "minor": 1, "micro": 3}, "package": ""},
                "capabilities": [],
            }
        }
        connection.sendall(json.dumps(greeting).encode() + b"\r\n")
        buffer = ""
        while self.status != "ended" and not self.dead:
            try:
                data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 4)
            except OSError:
                return
            self._received += fds
            if not data:
                return
            buffer += data.decode()
            buffer = self._take(connection, buffer)

    def _take(self, connection: socket.socket, buffer: str) -> str:
        """Answer all complete messages and return the remaining bytes."""
        decoder = json.JSONDecoder()
        while buffer := buffer.lstrip():
            try:
                message, end = decoder.raw_decode(buffer)
            except ValueError:
                break
            buffer = buffer[end:]
            self._answer(connection, message)
        return buffer

    def _answer(self, connection: socket.socket, message: dict[str, Any]) -> None:
        name, arguments = message["execute"], message.get("arguments", {})
        self.log.append(name)
        self.on(name)
        try:
            if name in self.refuse:
                raise Refused(f"{name} is refused")
            method = getattr(self, "do_" + name.replace("-", "_"), None)
            if method is None:
                raise Refused(f"the command {name} has not been found")
            reply = {"return": method(arguments)}
        except Refused as error:
            reply = {"error": {"class": "GenericError", "desc": str(error)}}
        if self.mute and name == "quit":
            return  # the process exits before it answers
        reply["id"] = message.get("id")
        out = json.dumps(reply).encode() + b"\r\n"
        if name == "device_del" and "return" in reply and self.lets_go:
            out += json.dumps(event("DEVICE_DELETED", path="/machine/peripheral/balloon0")).encode()
            out += b"\r\n"
        for pending in self.events:
            out = json.dumps(pending).encode() + b"\r\n" + out
        self.events = []
        try:
            connection.sendall(out)
        except OSError:
            pass  # the client has disconnected

    # commands

    def do_qmp_capabilities(self, _: Any) -> Any:
        return {}

    def do_query_status(self, _: Any) -> Any:
        return {"status": self.status, "running": self.status == "running"}

    def do_query_version(self, _: Any) -> Any:
        return {"qemu": {"major": 11, "minor": 1, "micro": 3}, "package": ""}

    def do_query_target(self, _: Any) -> Any:
        return {"arch": "x86_64"}

    def do_query_memdev(self, _: Any) -> Any:
        return [{"id": "mem", "size": self.size, "share": True}, *self.more_memory]

    def do_x_query_ramblock(self, _: Any) -> Any:
        text = "\n Block Name    PSize    Offset    Used    Total    HVA  RO\n"
        text += BLOCK.format(name="mem", size=self.size, host=self.host, mode="rw")
        text += BLOCK.format(name="pc.bios", size=1 << 18, host=1 << 46, mode="ro")
        if self.graphics:
            text += BLOCK.format(name="0000:00:02.0/vga.vram", size=1, host=1 << 45, mode="rw")
        return {"human-readable-text": text}

    def do_qom_list(self, arguments: Any) -> Any:
        if arguments["path"] == "/machine/peripheral" and self.device is not None:
            return [{"name": "balloon0", "type": f"child<{self.device['driver']}>"}]
        if arguments["path"] == "/machine/peripheral/balloon0":
            return [{"name": name, "type": "str"} for name in self.device or {}]
        return []

    def do_qom_get(self, arguments: Any) -> Any:
        path, name = arguments["path"], arguments["property"]
        if path.startswith("/objects/"):
            return {"type": self.backend_type, "mem-path": self.backend_path}[name]
        if path == "/machine":
            return "pc-q35-11.1-machine"
        if name == "parent_bus":
            return "/machine/peripheral/rp0/rp0"
        return (self.device or {})[name]

    def do_query_chardev(self, _: Any) -> Any:
        return [{"label": k, "filename": f"unix:{v}"} for k, v in self.chardevs.items()]

    def do_chardev_remove(self, arguments: Any) -> Any:
        if self.chardevs.pop(arguments["id"], None) is None:
            raise Refused("Chardev not found")
        return {}

    def do_chardev_add(self, arguments: Any) -> Any:
        address = arguments["backend"]["data"]["addr"]
        self.chardevs[arguments["id"]] = address["data"]["path"]
        return {}

    def do_device_del(self, _: Any) -> Any:
        if self.lets_go:
            self.device = None
        return {}

    def do_device_add(self, arguments: Any) -> Any:
        if self.device is not None:
            raise Refused("Duplicate device ID")
        self.device = arguments
        return {}

    def do_stop(self, _: Any) -> Any:
        self.status = "paused"
        return {}

    def do_cont(self, _: Any) -> Any:
        self.status = "running"
        self.events.append(event("RESUME"))
        return {}

    def do_quit(self, _: Any) -> Any:
        self.status = "ended"
        return {}

    def do_add_fd(self, _: Any) -> Any:
        number = len(self._fds)
        self._fds[number] = self._received.pop()
        return {"fdset-id": number, "fd": 3}

    def do_remove_fd(self, arguments: Any) -> Any:
        os.close(self._fds.pop(arguments["fdset-id"]))
        return {}

    def do_query_migrate_capabilities(self, _: Any) -> Any:
        return [
            {"capability": "x-ignore-shared", "state": self.capability},
            {"capability": "mapped-ram", "state": self.mapped_ram},
        ]

    def do_migrate_set_capabilities(self, arguments: Any) -> Any:
        self.capability = arguments["capabilities"][0]["state"]
        return {}

    def _save(self, path: str, content: bytes) -> None:
        if self.status == "running":
            raise Refused("the guest runs")
        if self.device is not None:
            raise Refused("State blocked by non-migratable device")
        os.write(self._fds[int(path.rpartition("/")[2])], content)

    def do_xen_save_devices_state(self, arguments: Any) -> Any:
        self._save(arguments["filename"], b"QEVM\0\0\0\3device state")
        return {}

    def do_migrate(self, arguments: Any) -> Any:
        if not self.capability:
            raise Refused("all RAM would be saved")
        self._save(arguments["uri"], b"device state")
        self.status = "postmigrate"
        self.migration = {"status": "completed"}
        return {}

    def do_migrate_cancel(self, _: Any) -> Any:
        self.migration = {"status": "cancelled"}
        return {}

    def do_query_migrate(self, _: Any) -> Any:
        return self.migration | ({"blocked-reasons": self.blocked} if self.blocked else {})

    def do_human_monitor_command(self, arguments: Any) -> Any:
        assert arguments == {"command-line": "info network"}
        return self.networks


def event(name: str, **data: Any) -> dict[str, Any]:
    return {"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 0}}
