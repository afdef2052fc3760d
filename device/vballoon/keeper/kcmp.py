# SPDX-License-Identifier: Apache-2.0
"""Compare two descriptors: do they refer to the same open file (kcmp(2))?"""

from __future__ import annotations

import ctypes
import os
import platform

__all__ = ("same_file",)

_KCMP_FILE = 0
_NUMBERS = {"x86_64": 312, "aarch64": 272}
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


def same_file(one: int, other: int) -> bool:
    """Return whether both descriptors of this process refer to the same open file.

    That is more than the same inode: all eventfds share one.  Raise OSError for a descriptor that
    is not open, or where the kernel has no kcmp.
    """
    pid = os.getpid()
    number = _NUMBERS[platform.machine()]
    args = [ctypes.c_long(v) for v in (number, pid, pid, _KCMP_FILE, one, other)]
    order = _syscall(*args)
    if order < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return bool(order == 0)
