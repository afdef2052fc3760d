# SPDX-License-Identifier: Apache-2.0
"""Find the balloon device in QEMU, unplug it, and plug it in again as it was.

QEMU refuses to save a machine that has one of these devices.  Unplugging is a request to the
guest: it needs a bus that supports it (any slot of ``-machine pc``, a root port of ``q35``) and a
guest that answers.
"""

from __future__ import annotations

import stat
import time
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vballoon.errors import UsageError
from vballoon.snapshot.qmp_vm import QemuRefused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vballoon.snapshot.qmp_vm import QemuVm

__all__ = (
    "BalloonDevice", "Release", "UnplugRefused", "find_balloon", "plug", "require_balloon",
    "resolve_socket", "unplug", "wait_until_gone",
)  # fmt: skip

VHOST_USER, VFIO_USER = "vhost-user-test-device-pci", "vfio-user-pci"
BALLOON_ID = 5
_COPIED = (
    "addr", "virtio-id", "num_vqs", "vq_size", "config_size",
    "multifunction", "acpi-index", "iommu_platform", "ats", "page-per-vq",
)  # fmt: skip
"""Properties that are copied when they are set; ``bus`` and ``chardev`` are handled apart."""
SOCKET_PREFIX = "unix:"
POLL_SECONDS = 0.01
RELEASE_SECONDS = 3.0
PLUG_ATTEMPTS = 3
"""A vfio-user back-end may still be closing the old connection: QEMU gives up after 5 s."""


@dataclass(frozen=True, slots=True)
class BalloonDevice:
    """A balloon device.

    ``path``: of the QOM object; ``arguments``: of ``device_add``, to make the same device again;
    ``chardev``: ``id`` and ``path`` of its socket (None: it cannot be made again).
    """

    path: str
    arguments: dict[str, Any]
    chardev: dict[str, str] | None


def require_balloon(arguments: dict[str, Any]) -> None:
    """Raise UsageError unless *arguments*, which are untrusted, plug in a balloon and no more.

    Any other device could reach into the host, for example with a file as its ROM.
    """
    known = {"driver", "id", "bus", "chardev", "socket", *_COPIED}
    plain = all(isinstance(v, str | int) for k, v in arguments.items() if k != "socket")
    driver = arguments["driver"]
    number = arguments.get("virtio-id", BALLOON_ID if driver == VFIO_USER else None)
    if driver not in (VHOST_USER, VFIO_USER) or set(arguments) - known or not plain:
        raise UsageError(f"the snapshot's balloon device is not a balloon: {arguments}")
    if number != BALLOON_ID or ("socket" in arguments) != (driver == VFIO_USER):
        raise UsageError(f"the snapshot's balloon device is not a balloon: {arguments}")


def find_balloon(vm: QemuVm, name: str | None = None, socket: str | None = None) -> BalloonDevice:
    """Return the balloon with id *name*, or the only one; *socket*: that of a vfio-user device.

    Raise :class:`~vballoon.errors.UsageError` where there is none, or more than one.
    """
    found = [
        (path, kind)
        for path, kind in _devices(vm)
        if (name is None or path.rpartition("/")[2] == name) and _is_balloon(vm, path, kind)
    ]
    if len(found) != 1:
        which = f" with id {name}" if name else ""
        hint = "; name one with --device" if found else ""
        raise UsageError(f"QEMU has {len(found) or 'no'} vballoon devices{which}{hint}")
    path, kind = found[0]
    return _describe(vm, path, kind, socket)


def _devices(vm: QemuVm) -> list[tuple[str, str]]:
    found = []
    for parent in ("/machine/peripheral", "/machine/peripheral-anon"):
        for child in vm.execute("qom-list", path=parent):
            for kind in (VHOST_USER, VFIO_USER):
                if child["type"] == f"child<{kind}>":
                    found.append((f"{parent}/{child['name']}", kind))
    return found


def _is_balloon(vm: QemuVm, path: str, kind: str) -> bool:
    if kind == VFIO_USER:
        return True  # QEMU does not report its PCI ids
    return bool(vm.execute("qom-get", path=path, property="virtio-id") == BALLOON_ID)


def _describe(vm: QemuVm, path: str, kind: str, socket: str | None) -> BalloonDevice:
    properties = {p["name"]: p for p in vm.execute("qom-list", path=path)}
    arguments: dict[str, Any] = {"driver": kind}
    if path.startswith("/machine/peripheral/"):
        arguments["id"] = path.rpartition("/")[2]
    bus = vm.execute("qom-get", path=path, property="parent_bus")
    arguments["bus"] = bus.rpartition("/")[2]
    for name in _COPIED:
        if name in properties:
            value = vm.execute("qom-get", path=path, property=name)
            if value or name == "addr":
                arguments[name] = value
    if kind == VFIO_USER:
        if any(name.startswith("VFIO MSIX PBA") for name in properties):
            raise UsageError(
                "QEMU would abort when this vfio-user device is unplugged, because it has MSI-X; "
                "serve it with --no-msix"
            )
        if socket is None:
            raise UsageError(
                "QEMU does not report a vfio-user device's socket: --device-socket is needed"
            )
        arguments["socket"] = {"type": "unix", "path": socket}
        return BalloonDevice(path, arguments, None)
    arguments["chardev"] = vm.execute("qom-get", path=path, property="chardev")
    return BalloonDevice(path, arguments, _chardev(vm, arguments["chardev"]))


def _chardev(vm: QemuVm, label: str) -> dict[str, str] | None:
    for chardev in vm.execute("query-chardev"):
        if chardev["label"] == label:
            where = chardev["filename"].removeprefix("disconnected:")
            if where.startswith(SOCKET_PREFIX) and not where.endswith(",server=on"):
                return {"id": label, "path": where.removeprefix(SOCKET_PREFIX)}
    return None


class Release(Enum):
    """What has become of a request to unplug."""

    GONE = "gone"
    REFUSED = "refused"
    PENDING = "pending"


class UnplugRefused(UsageError):
    """QEMU or the guest has refused the unplug, and the guest keeps its balloon."""


def resolve_socket(
    device: BalloonDevice, socket: str | None, folders: Sequence[Path]
) -> BalloonDevice:
    """Return *device* with an absolute path of its back-end's socket, which exists.

    QEMU reports the path as the back-end gave it to bind(), which may be relative to the
    back-end's folder; look in *folders*.  *socket*: given by the operator instead.  Raise
    UsageError where there is no socket: the balloon could not be plugged in again.
    """
    if device.chardev is None and "socket" not in device.arguments:
        return device
    known = device.chardev or device.arguments["socket"]
    given = Path(socket or known["path"])
    found = [place for folder in folders if _is_socket(place := (folder / given))]
    if not found:
        raise UsageError(
            f"the balloon's back-end has no socket at {given}, so the balloon could not be plugged "
            "in again; give its path with --device-socket"
        )
    known = {**known, "path": str(found[0])}
    if device.chardev is None:
        return replace(device, arguments={**device.arguments, "socket": known})
    return replace(device, chardev=known)


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False


def unplug(vm: QemuVm, device: BalloonDevice, timeout: float) -> None:
    """Have the guest release *device*.

    Raise UnplugRefused if it refuses.  Raise UsageError if it has not answered within *timeout*
    seconds; the request cannot be withdrawn, so it may still release it.
    """
    try:
        vm.execute("device_del", id=device.arguments.get("id", device.path))
    except QemuRefused as error:
        raise UnplugRefused(str(error)) from None
    release = wait_until_gone(vm, device.path, timeout)
    if release is Release.REFUSED:
        raise UnplugRefused("the guest refused to release the balloon")
    if release is Release.PENDING:
        raise UsageError(f"the guest did not release the balloon within {timeout:g} s")
    if device.arguments["driver"] == VFIO_USER:
        # QEMU keeps the connection until the last reference to the device is dropped.
        vm.wait_event("DEVICE_DELETED", RELEASE_SECONDS, path=device.path)


def wait_until_gone(vm: QemuVm, path: str, timeout: float) -> Release:
    """Wait until the device at *path* is gone or the guest refuses, at most *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while True:
        # The event may come well after the device is gone: it waits for its last reference.
        if vm.wait_event("DEVICE_DELETED", POLL_SECONDS, path=path) or not _exists(vm, path):
            return Release.GONE
        if vm.wait_event("DEVICE_UNPLUG_GUEST_ERROR", 0, path=path):
            return Release.REFUSED
        if time.monotonic() > deadline:
            return Release.PENDING


def _exists(vm: QemuVm, path: str) -> bool:
    parent, _, name = path.rpartition("/")
    return any(child["name"] == name for child in vm.execute("qom-list", path=parent))


def plug(vm: QemuVm, arguments: dict[str, Any], chardev: dict[str, str] | None) -> None:
    """Plug the balloon in over a new connection of its socket.

    On the old connection the back-end would receive the same memory table twice.
    """
    if chardev is not None:
        try:
            vm.execute("chardev-remove", id=chardev["id"])
        except QemuRefused:
            pass  # this QEMU never had the device
        address = {"type": "unix", "data": {"path": chardev["path"]}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        vm.execute("chardev-add", id=chardev["id"], backend=backend)
    for attempt in range(PLUG_ATTEMPTS):
        try:
            vm.execute("device_add", **arguments)
        except QemuRefused as error:
            if "timed out" not in str(error) or attempt == PLUG_ATTEMPTS - 1:
                raise
        else:
            return
