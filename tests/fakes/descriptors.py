# SPDX-License-Identifier: Apache-2.0
"""Count the descriptors of this process, to detect leaks of tests and of the product."""

from __future__ import annotations

import os
from contextlib import suppress


def open_fds() -> int:
    """Return the number of descriptors that this process has open."""
    return len(os.listdir("/proc/self/fd"))


def named_fds() -> dict[int, str]:
    """Return what this process has open: descriptors, and what they refer to.

    The one empty memfd that ``vballoon.native.guard`` keeps for the process's life is left out.
    """
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
    return {fd: name for fd, name in found.items() if "memfd:vballoon-signal" not in name}
