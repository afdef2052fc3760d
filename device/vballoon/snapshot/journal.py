# SPDX-License-Identifier: Apache-2.0
"""The journal of a snapshot: what has to be undone, written before it is done.

Each change of the machine is made inside :meth:`Journal.doing`, which writes first.  Whoever reads
the journal after a death can therefore trust that nothing was done that is not in it; something
may be in it that was not done yet, so undoing asks QEMU what the state is.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vballoon.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ("FLAGS", "Entry", "Journal", "JournalFile")


FLAGS = ("unplug", "stop", "migrate", "gone", "over")
"""Fields of an entry that say what has to be undone or decided."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What has been done, or is about to be done, to the machine at monitor ``qmp``."""

    qmp: str
    device_path: str = ""
    """QOM path of the balloon."""
    device: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``device_add`` that make the same balloon again."""
    chardev: dict[str, str] | None = None
    unplug: bool = False
    """The guest was asked to release the balloon."""
    stop: bool = False
    """The guest was running and was stopped."""
    migrate: bool = False
    """QEMU was asked for the device state; restore ``x-ignore-shared`` to ``ignore_shared``."""
    ignore_shared: bool = False
    gone: bool = False
    """The last bytes of a moving machine are on their way: it may run elsewhere from now on."""
    over: bool = False
    """The snapshot is complete and is the machine from now on: QEMU is to end, never to resume."""
    qemu: str = ""
    """QEMU's process, ``PID:START``."""
    memory: tuple[int, int] = (0, 0)
    """(device, inode) of a file of guest memory: what is locked."""
    file: str = ""
    """Path of the journal's file."""

    @property
    def pending(self) -> bool:
        """Whether something is left to be undone or decided."""
        return any(getattr(self, name) for name in FLAGS)

    def dumps(self) -> bytes:
        """Return the entry as one line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def loads(cls, line: bytes) -> Entry:
        """Return the entry of a line of :meth:`dumps`. Raise UsageError if it is not one."""
        try:
            entry = cls(**json.loads(line))
            device, inode = entry.memory
            return replace(entry, memory=(int(device), int(inode)))
        except (ValueError, TypeError) as error:
            raise UsageError(f"not an entry of a snapshot's journal: {error}") from None


class Journal:
    """The current :class:`Entry`, written to every one of *sinks* before it becomes current."""

    def __init__(self, entry: Entry, *sinks: Callable[[Entry], None]) -> None:
        self.entry = entry
        self._sinks = list(sinks)

    def add(self, sink: Callable[[Entry], None]) -> None:
        """Write the current entry, and all that follow, to *sink* as well."""
        sink(self.entry)
        self._sinks.append(sink)

    def write(self, **changes: Any) -> None:
        """Make the entry with *changes* the current one, after every sink has taken it."""
        entry = replace(self.entry, **changes)
        for sink in self._sinks:
            sink(entry)
        self.entry = entry

    def clear(self) -> None:
        """Note that nothing is left to be undone, because QEMU has ended. Raise nothing."""
        nothing: dict[str, Any] = dict.fromkeys(FLAGS, False)
        self.entry = replace(self.entry, **nothing)
        for sink in self._sinks:
            with contextlib.suppress(OSError, UsageError):
                sink(self.entry)

    @contextlib.contextmanager
    def doing(self, **changes: Any) -> Iterator[None]:
        """Write *changes* ahead of the body.

        They stay written when the body fails: the command may have had its effect nevertheless.
        """
        self.write(**changes)
        yield

    @contextlib.contextmanager
    def undoing(self, *names: str) -> Iterator[None]:
        """Clear the flags *names* after the body has succeeded, and only then."""
        yield
        self.write(**dict.fromkeys(names, False))


class JournalFile:
    """The journal's file at *path*, which outlives both the snapshot and its guardian.

    It is replaced atomically and not synced: it is not needed after a crash of the host, which ends
    QEMU too.  Raise UsageError where it cannot be read or written.
    """

    LIMIT = 1 << 16

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def read(self) -> Entry | None:
        """Return the entry, or None if there is no file."""
        try:
            with self.path.open("rb") as file:
                return Entry.loads(file.read(self.LIMIT))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}") from None
        except UsageError as error:
            raise UsageError(f"{self.path}: {error}; remove it if it is not needed") from None

    def write(self, entry: Entry) -> None:
        """Replace the file's content by *entry*; remove the file if nothing is pending."""
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            if not entry.pending:
                self.path.unlink(missing_ok=True)
                return
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(draft, flags, 0o600), "wb") as file:
                file.write(entry.dumps())
            draft.rename(self.path)
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}; see --journal") from None
