# SPDX-License-Identifier: Apache-2.0
"""VFIO_USER_VERSION: the version numbers and the JSON capabilities after them.

vfio-user specification (QEMU 11.1), section ``VFIO_USER_VERSION``.  The ``migration`` object is
not in that text any more, but QEMU 11.1 and libvfio-user both still send it, so it is read and
written like the others.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from virtio_formats.declare import c
from virtio_formats.wire import WireError, WireStruct

__all__ = (
    "DEFAULT_MAX_DATA_XFER_SIZE",
    "DEFAULT_MAX_DMA_MAPS",
    "DEFAULT_PGSIZES",
    "MAX_MSG_FDS_LIMIT",
    "VERSION_MAJOR",
    "VERSION_MINOR",
    "Capabilities",
    "Version",
)

VERSION_MAJOR = 0
VERSION_MINOR = 0

DEFAULT_MAX_DATA_XFER_SIZE = 1 << 20
DEFAULT_MAX_DMA_MAPS = 65535
DEFAULT_PGSIZES = 4096
MAX_MSG_FDS_LIMIT = 1024
"""More descriptors than any kernel carries in one message: such a number is a mistake."""


class Version(WireStruct):
    """The fixed part of the version message; the version data (JSON, NUL-terminated) follows."""

    major: int
    minor: int

    SUBCON = c.Struct("major" / c.Int16un, "minor" / c.Int16un)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What one side of the connection can do; the defaults are those of the specification."""

    max_msg_fds: int = 1
    """Descriptors that the sender takes in one message."""
    max_data_xfer_size: int = DEFAULT_MAX_DATA_XFER_SIZE
    """Largest ``count`` of a data transfer message, in bytes."""
    max_dma_maps: int = DEFAULT_MAX_DMA_MAPS
    """DMA windows that can be valid at a time."""
    pgsizes: int = DEFAULT_PGSIZES
    """Page sizes of DMA maps, or'ed together, in bytes."""
    twin_socket: bool = False
    """Server commands may go over a socket of their own."""
    twin_socket_fd_index: int | None = None
    """In a reply: which descriptor of the message is the client's end of that socket."""
    write_multiple: bool = False
    """REGION_WRITE_MULTI is understood."""
    migration_pgsize: int | None = None
    """Page size of dirty bitmaps in bytes, where the sender speaks of migration at all."""
    migration_max_bitmap_size: int | None = None
    names: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)
    """Which of the top-level names the text had; not part of what is built."""

    @classmethod
    def parse(cls, data: bytes) -> Capabilities:
        """Read version data (the JSON text with its NUL, or nothing at all).

        Unknown names are ignored.  Raises :class:`~virtio_formats.wire.WireError` for text that is
        not NUL-terminated UTF-8 JSON, a value of the wrong type, or a number out of range.
        """
        if not data:
            return cls()
        import json  # only for this message

        if data[-1]:
            raise WireError("version data does not end with NUL")
        try:
            root = json.loads(data[:-1].split(b"\0", 1)[0].decode())
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            raise WireError(f"version data is not JSON: {type(error).__name__}") from None
        found = _member(_object(root, "version data"), "capabilities")
        return cls(**_known(found), names=frozenset(found))

    def build(self, only: frozenset[str] | None = None) -> bytes:
        """Return the version data as JSON with its NUL, restricted to the top-level names *only*.

        Without spaces, because a client may read the reply into a buffer of the size of its
        request (QEMU 11.1 does).
        """
        import json

        known = self._members()
        if only is not None:
            known = {name: value for name, value in known.items() if name in only}
        return json.dumps({"capabilities": known}, separators=(",", ":")).encode() + b"\0"

    def _members(self) -> dict[str, Any]:
        known: dict[str, Any] = {
            "max_msg_fds": self.max_msg_fds,
            "max_data_xfer_size": self.max_data_xfer_size,
            "max_dma_maps": self.max_dma_maps,
            "pgsizes": self.pgsizes,
            "write_multiple": self.write_multiple,
        }
        if self.migration_pgsize is not None:
            known["migration"] = {"pgsize": self.migration_pgsize}
            if self.migration_max_bitmap_size is not None:
                known["migration"]["max_bitmap_size"] = self.migration_max_bitmap_size
        if self.twin_socket:
            known["twin_socket"] = {"supported": True}
            if self.twin_socket_fd_index is not None:
                known["twin_socket"]["fd_index"] = self.twin_socket_fd_index
        return known


def _known(found: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if "max_msg_fds" in found:
        values["max_msg_fds"] = _number(found, "max_msg_fds", 0, MAX_MSG_FDS_LIMIT)
    for name in ("max_data_xfer_size", "max_dma_maps"):
        if name in found:
            values[name] = _number(found, name, 0, 2**63 - 1)
    if "pgsizes" in found:
        values["pgsizes"] = _page_size(found, "pgsizes")
    if "write_multiple" in found:
        values["write_multiple"] = _boolean(found, "write_multiple")
    twin = _member(found, "twin_socket")
    if "supported" in twin:
        values["twin_socket"] = _boolean(twin, "supported")
    if "fd_index" in twin:
        values["twin_socket_fd_index"] = _number(twin, "fd_index", 0, MAX_MSG_FDS_LIMIT)
    migration = _member(found, "migration")
    if "pgsize" in migration:
        values["migration_pgsize"] = _page_size(migration, "pgsize")
    if "max_bitmap_size" in migration:
        size = _number(migration, "max_bitmap_size", 0, 2**63 - 1)
        values["migration_max_bitmap_size"] = size
    return values


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WireError(f"{name} is not a JSON object")
    return value


def _member(parent: dict[str, Any], name: str) -> dict[str, Any]:
    return _object(parent.get(name, {}), name)


def _boolean(parent: dict[str, Any], name: str) -> bool:
    value = parent[name]
    if not isinstance(value, bool):
        raise WireError(f"{name} is not a boolean")
    return value


def _number(parent: dict[str, Any], name: str, low: int, high: int) -> int:
    value = parent[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise WireError(f"{name} is not a number from {low} to {high}")
    return value


def _page_size(parent: dict[str, Any], name: str) -> int:
    value = _number(parent, name, DEFAULT_PGSIZES, 2**63 - 1)
    if value % DEFAULT_PGSIZES:
        raise WireError(f"{name} is not made of page sizes of 4 KiB and more")
    return value
