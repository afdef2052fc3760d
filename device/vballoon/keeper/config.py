# SPDX-License-Identifier: Apache-2.0
"""Read the TOML file for ``vballoon serve --config``, which describes several machines."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

from vballoon.errors import UsageError
from vballoon.sizes import parse_limits

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ("ENGINES", "WHERE", "read_config")

WHERE = ("vhost-user", "vfio-user", "fd")
"""Options of which a machine has exactly one."""
ENGINES = ("batch", "scalar")
_KINDS: dict[str, type] = {
    "vhost-user": str,
    "vfio-user": str,
    "fd": int,
    "control": str,
    "min": str,
    "max": str,
    "memory": str,
    "client": bool,
    "no-discard": bool,
    "features": str,
    "engine": str,
    "no-msix": bool,
    "name": str,
    "folders": list,
    "user": str,
    "group": str,
}


def read_config(path: Path) -> list[dict[str, Any]]:
    """Return the ``[[vm]]`` tables of the TOML file *path*.  Raise :class:`UsageError`."""
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    machines = data.get("vm")
    if set(data) != {"vm"} or not isinstance(machines, list) or not machines:
        raise UsageError(f"{path}: [[vm]] tables are expected, and nothing else")
    for number, machine in enumerate(machines, start=1):
        _check_machine(f"{path}: vm {number}", machine)
    return machines


def _check_machine(where: str, machine: dict[str, Any]) -> None:
    for key, value in machine.items():
        if key not in _KINDS:
            raise UsageError(f"{where}: unknown key {key!r}; known: {', '.join(_KINDS)}")
        if type(value) is not _KINDS[key]:
            raise UsageError(f"{where}: {key} must be of type {_KINDS[key].__name__}")
    if machine.get("engine", "batch") not in ENGINES:
        raise UsageError(f"{where}: engine must be one of {', '.join(ENGINES)}")
    try:
        parse_limits(machine)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    if sum(key in machine for key in WHERE) != 1:
        raise UsageError(f"{where}: exactly one of {', '.join(WHERE)} is needed")
