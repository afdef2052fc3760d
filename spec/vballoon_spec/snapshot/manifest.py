# SPDX-License-Identifier: Apache-2.0
"""``manifest.json`` of a snapshot, version 1: typed, and checked when read.

The fields' meaning is in ``README.md`` beside this file.  Reading is strict about known keys.
Unknown keys are ignored; an unknown version is refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

__all__ = (
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "STATE_FILE",
    "MemoryFile",
    "SnapshotManifest",
    "SnapshotManifestError",
    "StateFile",
    "StateKind",
)

FORMAT_NAME = "vballoon-snapshot"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state"
PAGE_SIZE = 4096
T = TypeVar("T")


class SnapshotManifestError(ValueError):
    """This is not the manifest of a whole snapshot. The text names the field."""


class StateKind(StrEnum):
    """How QEMU wrote the device state, which decides how QEMU must be set up to read it."""

    IGNORE_SHARED = "ignore-shared"
    """``migrate`` with the capability ``x-ignore-shared``: everything but shared files of RAM."""
    DEVICES_ONLY = "devices-only"
    """``xen-save-devices-state``: devices, and no RAM at all."""


@dataclass(frozen=True, slots=True)
class StateFile:
    """QEMU's device state."""

    kind: StateKind
    bytes: int
    sha256: str
    file: str = STATE_FILE


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """One memory backend of QEMU and its sparse copy."""

    id: str
    """Id of the memory backend."""
    file: str
    size: int
    """Bytes, holes included."""
    data: int
    """Bytes that were copied."""
    sha256: str
    """Of the content: see README.md, *Checksums*."""


@dataclass(frozen=True, slots=True)
class SnapshotManifest:
    """The whole manifest."""

    created_ns: int
    """UNIX time at which the guest was stopped."""
    qemu: dict[str, str]
    """``version``, ``machine``, ``target``."""
    state: StateFile
    memory: tuple[MemoryFile, ...]
    left_out: dict[str, int]
    """Bytes of guest memory that were not copied: ``holes``, ``verified``."""
    verification: str
    """``""``: the guest's free lists were read; else why not."""
    balloon: dict[str, Any]
    """``device``: arguments of ``device_add``; ``chardev``: its socket's id and path, or null;
    ``target``: bytes that the guest should have, or null: all."""
    format: str = FORMAT_NAME
    version: int = FORMAT_VERSION
    extra: dict[str, Any] = field(default_factory=dict)
    """Times and figures of the making, for people."""

    def dumps(self) -> str:
        """Return the JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def loads(cls, text: str | bytes) -> SnapshotManifest:
        """Read and check a manifest. Raise :class:`SnapshotManifestError`."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SnapshotManifestError(f"not JSON: {error}") from None
        if _get(data, "format", str) != FORMAT_NAME:
            raise SnapshotManifestError(f"format: not {FORMAT_NAME!r}")
        if _get(data, "version", int) != FORMAT_VERSION:
            raise SnapshotManifestError(f"version: {data['version']} is unknown")
        memory = tuple(_memory(entry) for entry in _get(data, "memory", list))
        _check_names(memory)
        return cls(
            created_ns=_get(data, "created_ns", int),
            qemu=_texts(_get(data, "qemu", dict), ("version", "machine", "target")),
            state=_state(_get(data, "state", dict)),
            memory=memory,
            left_out={k: v for k, v in _get(data, "left_out", dict).items() if type(v) is int},
            verification=_get(data, "verification", str),
            balloon=_balloon(_get(data, "balloon", dict)),
        )


def _get(data: Any, key: str, kind: type[T]) -> T:
    value = data.get(key) if isinstance(data, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise SnapshotManifestError(f"{key}: {kind.__name__} expected")
    return value


def _texts(data: dict[str, Any], keys: tuple[str, ...]) -> dict[str, str]:
    return {key: _get(data, key, str) for key in keys}


def _bytes(data: dict[str, Any], key: str) -> int:
    value = _get(data, key, int)
    if not 0 <= value < 1 << 63:
        raise SnapshotManifestError(f"{key}: {value} is out of range")
    return value


def _plain_name(data: dict[str, Any], key: str) -> str:
    name = _get(data, key, str)
    if not name or "/" in name or "\0" in name or name in (".", "..", MANIFEST_FILE):
        raise SnapshotManifestError(f"{key}: {name!r} is not a plain file name")
    return name


def _digest(data: dict[str, Any]) -> str:
    digest = _get(data, "sha256", str)
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise SnapshotManifestError("sha256: 64 hexadecimal digits expected")
    return digest


def _state(data: dict[str, Any]) -> StateFile:
    kind = _get(data, "kind", str)
    if kind not in set(StateKind):
        raise SnapshotManifestError(f"state: kind {kind!r} is unknown")
    return StateFile(
        StateKind(kind), _bytes(data, "bytes"), _digest(data), _plain_name(data, "file")
    )


def _memory(data: Any) -> MemoryFile:
    size, copied = _bytes(data, "size"), _bytes(data, "data")
    if not size or size % PAGE_SIZE or copied > size:
        raise SnapshotManifestError(f"memory: {copied} of {size} bytes")
    ident = _get(data, "id", str)
    if not ident or set(ident) & set(",=/\0"):
        raise SnapshotManifestError(f"memory: id {ident!r}")
    return MemoryFile(ident, _plain_name(data, "file"), size, copied, _digest(data))


def _balloon(data: dict[str, Any]) -> dict[str, Any]:
    device = _get(data, "device", dict)
    _get(device, "driver", str)
    chardev = data.get("chardev")
    if chardev is not None:
        _texts(_get(data, "chardev", dict), ("id", "path"))
    target = None if data.get("target") is None else _bytes(data, "target")
    return {"device": device, "chardev": chardev, "target": target}


def _check_names(memory: tuple[MemoryFile, ...]) -> None:
    for names in ([m.id for m in memory], [m.file for m in memory] + [STATE_FILE]):
        if not memory or len(set(names)) != len(names):
            raise SnapshotManifestError("memory: no file, or one twice")
