# SPDX-License-Identifier: Apache-2.0
"""What a snapshot knows before it begins and when it is done, and who is told on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from vballoon.snapshot.device import BalloonDevice
    from vballoon.snapshot.qmp_vm import Memdev
    from vballoon.snapshot.source import RamFile
    from vballoon_spec.snapshot import StateKind

__all__ = ("Copied", "Observer", "Plan", "Taken")


class Observer:
    """Is told how it goes; does nothing by itself.  A context manager, for whoever shows it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, name: str) -> None:
        """Step *name* begins."""

    def size(self, total: int) -> None:
        """*total* bytes will be copied."""

    def copied(self, done: int) -> None:
        """*done* more bytes are copied."""

    def say(self, text: str) -> None:
        """Something that the operator should know."""


@dataclass(slots=True)
class Plan:
    """What is going to be copied, found out while everything still runs."""

    kind: StateKind
    memdevs: list[Memdev]
    memory: list[tuple[Memdev, RamFile]]
    device: BalloonDevice
    qemu: dict[str, str]


@dataclass(slots=True)
class Copied:
    """Bytes copied of each file, and bytes left out by reason."""

    sizes: list[int]
    left_out: dict[str, int]


@dataclass(slots=True)
class Taken:
    """What came of it; ``why`` the free pages could not be told, ``stopped_ns`` of UNIX time."""

    copied: Copied
    why: str
    stopped_ns: int
