# SPDX-License-Identifier: Apache-2.0
"""Restrict this process to the folders that it was given (Landlock, linux/landlock.h).

Landlock refuses to open, create and remove files outside the folders, TCP connections, and signals
to processes outside the sandbox where the kernel knows these rights.  It does not refuse a
connection to a Unix socket by its path: seccomp does.  A file on tmpfs cannot be opened again
through ``/proc/self/fd``; a memfd can.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ("abi_version", "restrict_to")

# The same numbers on all architectures but alpha (asm-generic/unistd.h).
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

_FS_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 5: 16}
"""ABI version to the number of file system rights, which are the lowest bits."""
_EXECUTE = 1 << 0
_IOCTL_DEV = 1 << 15
_NET_RIGHTS = 0b11  # bind and connect TCP, from ABI 4 on
_SCOPES = 0b11  # abstract Unix sockets and signals, from ABI 6 on

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def abi_version() -> int:
    """Return the kernel's Landlock ABI version, 0 where Landlock is not available."""
    try:
        return _call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
            return 0
        raise


def restrict_to(folders: Iterable[int]) -> int:
    """Allow files below the directories *folders* (descriptors) only, for ever.

    The process must have set no_new_privs. Return the ABI version that was used; 0 where the
    kernel has no Landlock, and then nothing is restricted. Raise OSError where it cannot be done.
    """
    abi = abi_version()
    if abi == 0:
        return 0
    count = max(n for version, n in _FS_RIGHTS_BY_ABI.items() if version <= abi)
    rights = (1 << count) - 1
    net = _NET_RIGHTS if abi >= 4 else 0
    scopes = _SCOPES if abi >= 6 else 0
    fields = (rights, net, scopes) if abi >= 6 else (rights, net) if abi >= 4 else (rights,)
    attribute = struct.pack(f"={len(fields)}Q", *fields)  # struct landlock_ruleset_attr
    ruleset = _call(_CREATE_RULESET, attribute, ctypes.c_size_t(len(attribute)), ctypes.c_uint(0))
    try:
        for folder in folders:
            allowed = rights & ~(_EXECUTE | _IOCTL_DEV)
            rule = struct.pack("=Qi", allowed, folder)  # struct landlock_path_beneath_attr
            _call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, ctypes.c_uint(0))
        _call(_RESTRICT_SELF, ruleset, ctypes.c_uint(0))
    finally:
        os.close(ruleset)
    return abi
