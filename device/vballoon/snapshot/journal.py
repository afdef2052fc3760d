# SPDX-License-Identifier: Apache-2.0
"""The journal of a snapshot: what has to be undone, written before it is done.

Each change of the machine is made inside :meth:`Journal.doing`, which writes first.  Whoever reads
the journal after a death can therefore trust that nothing was done that is not in it; something
may be in it that was not done yet, so undoing asks QEMU what the state is.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vballoon.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ("Entry", "Journal")


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
    """Nothing is left to be undone."""

    def dumps(self) -> bytes:
        """Return the entry as one line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def loads(cls, line: bytes) -> Entry:
        """Return the entry of a line of :meth:`dumps`. Raise UsageError if it is not one."""
        try:
            return cls(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise UsageError(f"not an entry of a snapshot's journal: {error}") from None


class Journal:
    """The current :class:`Entry`, written to every one of *sinks* before it becomes current."""

    def __init__(self, entry: Entry, *sinks: Callable[[Entry], None]) -> None:
        self.entry = entry
        self._sinks = sinks

    def write(self, **changes: Any) -> None:
        """Make the entry with *changes* the current one, after every sink has taken it."""
        entry = replace(self.entry, **changes)
        for sink in self._sinks:
            sink(entry)
        self.entry = entry

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
