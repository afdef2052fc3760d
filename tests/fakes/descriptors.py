# SPDX-License-Identifier: Apache-2.0
"""Counting the descriptors of this process: nothing that a test or the product opens stays open."""

from __future__ import annotations

import os
from contextlib import suppress


def open_fds() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def named_fds() -> dict[int, str]:
    """What this process has open: descriptors, and what they are of."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
    return found
