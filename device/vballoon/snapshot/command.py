# SPDX-License-Identifier: Apache-2.0
"""Rewrite a QEMU command line so that it restores a snapshot.

The machine is built as it was, with three differences: guest memory is in our files, the balloon
is missing (it was unplugged when the state was saved), and QEMU loads a state.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vballoon.errors import UsageError
from vballoon_spec.snapshot import StateKind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from vballoon_spec.snapshot import SnapshotManifest

__all__ = ("incoming_words", "memory_words", "rewrite")

_KEPT = {"host-nodes", "policy", "merge", "dump", "reserve", "prealloc", "prealloc-threads"}
"""Properties of a memory backend that mean the same for a file."""


def memory_words(
    manifest: SnapshotManifest,
    ram: Mapping[str, Path],
    kept: Mapping[str, dict[str, Any]],
    *,
    private: bool = False,
) -> dict[str, str]:
    """Return the ``-object`` value for each memory backend.

    *ram*: its file; *kept*: further properties of it; *private*: map the file copy-on-write.
    """
    words = {}
    for memory in manifest.memory:
        backend = {
            "qom-type": "memory-backend-file",
            "id": memory.id,
            "size": memory.size,
            "mem-path": str(ram[memory.id]),
            "share": not private,
            **({"readonly": True, "rom": "off"} if private else {}),
            **kept.get(memory.id, {}),
        }
        words[memory.id] = json.dumps(backend)
    return words


def incoming_words(manifest: SnapshotManifest, state: Path) -> list[str]:
    """Return the arguments with which QEMU loads the state."""
    words = ["-incoming", f"file:{state}"]
    if manifest.state.kind is StateKind.IGNORE_SHARED:
        return ["-global", "migration.x-ignore-shared=on", *words]
    return words


def rewrite(
    words: Sequence[str],
    manifest: SnapshotManifest,
    ram: Mapping[str, Path],
    state: Path,
    *,
    private: bool = False,
) -> list[str]:
    """Return the command line *words* of the saved machine, changed so that it restores it.

    Raise :class:`~vballoon.errors.UsageError` where it is not the command line of that machine.
    """
    if not words:
        raise UsageError("no command to run")
    kept: dict[str, dict[str, Any]] = {}
    places: dict[str, int] = {}
    result = [words[0]]
    rest = iter(words[1:])
    for word in rest:
        option = word.lstrip("-") if word.startswith("-") else ""
        if option == "incoming":
            raise UsageError("the command loads another state already (-incoming)")
        if option not in ("object", "device", "chardev"):
            result.append(word)
            continue
        value = _value_of(word, rest)
        properties = _properties(value, "qom-type" if option == "object" else "driver")
        ident = properties.get("id")
        if option == "object" and ident in {memory.id for memory in manifest.memory}:
            kept[str(ident)] = {k: v for k, v in properties.items() if k in _KEPT}
            places[str(ident)] = len(result) + 1
        elif _is_balloon(option, properties, manifest):
            continue
        result += [word, value]
    missing = [memory.id for memory in manifest.memory if memory.id not in places]
    if missing:
        raise UsageError(f"the command has no memory backend with id={missing[0]}")
    for ident, value in memory_words(manifest, ram, kept, private=private).items():
        result[places[ident]] = value
    return result + incoming_words(manifest, state)


def _value_of(word: str, rest: Iterator[str]) -> str:
    value = next(rest, None)
    if value is None:
        raise UsageError(f"{word} without a value")
    return value


def _properties(value: str, implied: str) -> dict[str, Any]:
    """Return an option's value in either syntax: JSON, or ``type,key=value,…``."""
    if value.startswith("{"):
        try:
            found = json.loads(value)
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {}
    properties: dict[str, Any] = {}
    for number, part in enumerate(value.replace(",,", "\0").split(",")):
        key, equals, text = part.replace("\0", ",").partition("=")
        if not equals and number == 0:
            properties[implied] = key
        else:
            properties[key] = text if equals else "on"
    return {k: v == "on" if v in ("on", "off") else v for k, v in properties.items()}


def _is_balloon(option: str, properties: dict[str, Any], manifest: SnapshotManifest) -> bool:
    device, chardev = manifest.balloon["device"], manifest.balloon["chardev"]
    if option == "chardev":
        return chardev is not None and properties.get("id") == chardev["id"]
    if option != "device" or properties.get("driver") != device["driver"]:
        return False
    if "id" in device:
        return bool(properties.get("id") == device["id"])
    return "id" not in properties and properties.get("chardev") == device.get("chardev")
