# SPDX-License-Identifier: Apache-2.0
"""Single key presses from a terminal."""

from __future__ import annotations

import os
import select
import sys
import termios
import tty
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ("ENTER", "ESCAPE", "KEYS", "pressed")

ENTER, ESCAPE = "enter", "escape"
KEYS = {
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\r": ENTER,
    b"\n": ENTER,
    b"\x1b": ESCAPE,
    b"\x03": "q",
}
"""What a terminal sends for the keys that are no letters."""


@contextmanager
def pressed() -> Iterator[Callable[[float], str | None]]:
    """Give a function that waits up to so many seconds for a key; it returns None for no key.

    Where standard input is not a terminal it only waits.
    """
    fd = sys.stdin.fileno() if sys.stdin and sys.stdin.isatty() else None
    before = termios.tcgetattr(fd) if fd is not None else None

    def wait(seconds: float) -> str | None:
        ready, _, _ = select.select([fd] if fd is not None else [], [], [], max(0.0, seconds))
        if not ready or fd is None:
            return None
        data = os.read(fd, 16)
        return KEYS.get(data) or (data.decode(errors="replace")[:1] if data else "q")

    try:
        if fd is not None:
            tty.setcbreak(fd, termios.TCSANOW)
        yield wait
    finally:
        if fd is not None and before is not None:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)
