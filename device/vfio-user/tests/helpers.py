# SPDX-License-Identifier: Apache-2.0
"""Helpers of these tests."""

from __future__ import annotations

import os


def open_fds() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))
