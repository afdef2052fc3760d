# SPDX-License-Identifier: Apache-2.0
"""The lab's cache folder: where it is, who may change it, and what "finished" means.

Setting the lab up takes minutes and may be interrupted at any point, and two test runs may start at
once. Three rules keep the folder honest: one process changes it at a time (a file lock), a folder
appears under its final name only when it is complete (built beside it, then renamed), and each
carries a stamp of the recipe that made it, so that a changed recipe is built again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

STAMP = ".lab-stamp"


class LabError(RuntimeError):
    """The lab cannot do what was asked; the text says what to do about it."""


def cache_dir() -> Path:
    """Return the cache folder, ``$VBALLOON_LAB`` or ``~/.cache/vballoon-lab``; create it."""
    named = os.environ.get("VBALLOON_LAB")
    path = Path(named) if named else Path.home() / ".cache" / "vballoon-lab"
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def say(text: str) -> None:
    """One progress line on standard error (standard output belongs to results)."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


@contextmanager
def locked(name: str = "setup") -> Iterator[None]:
    """Hold the cache folder's lock ``name``; say so when another process has it."""
    with open(cache_dir() / f"{name}.lock", "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process to finish ({name})")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fingerprint(recipe: object) -> str:
    """Return a short digest of a recipe, which consists of plain JSON values."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def is_built(name: str, recipe: object) -> bool:
    """Whether ``name`` is complete in the cache and was made by this recipe."""
    try:
        return (cache_dir() / name / STAMP).read_text() == fingerprint(recipe)
    except (FileNotFoundError, NotADirectoryError):
        return False


def build_locked(name: str, recipe: object, lock: str, fill: Callable[[Path], None]) -> Path:
    """:func:`build` under a lock; without it, and without writing, where nothing is to be done."""
    if is_built(name, recipe):
        return cache_dir() / name
    with locked(lock):
        return build(name, recipe, fill)


def build(name: str, recipe: object, fill: Callable[[Path], None]) -> Path:
    """Return the folder ``name`` of the cache; fill it by ``fill(folder)`` unless it is built.

    ``fill`` works in a folder with another name, so that a failure or a kill leaves nothing that
    looks complete. Call it with the lock held.
    """
    final = cache_dir() / name
    if is_built(name, recipe):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    _sweep(final)
    started = time.monotonic()
    part = Path(tempfile.mkdtemp(prefix=final.name + ".part-", dir=final.parent))
    part.chmod(0o755)
    fill(part)
    (part / STAMP).write_text(fingerprint(recipe))
    if final.exists():
        shutil.rmtree(final)
    part.rename(final)
    say(f"{name}: ready ({time.monotonic() - started:.1f} s)")
    return final


def _sweep(final: Path) -> None:
    """Remove the remains of an interrupted build of ``final``; the caller holds the lock."""
    for left in final.parent.glob(final.name + ".part-*"):
        shutil.rmtree(left)
