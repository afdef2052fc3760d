# SPDX-License-Identifier: Apache-2.0
"""Memory barriers, for memory that a guest or a front-end reads and writes at the same time.

A store followed by a load of another location may be seen by others in the opposite order, on
every processor that matters.  The rings need the program order there ("store used index, load
the driver's event index"), and neither Python nor NumPy has a fence.  These calls contain one:

=========  ==================================  ============================================
machine    :func:`full` is                     and the instruction that fences
=========  ==================================  ============================================
x86-64     acquire and release of a            ``lock cmpxchg`` (in ``sem_trywait``, which
           ``threading.Lock`` of our own       CPython's lock is made of): a locked
                                               instruction orders all loads and stores
                                               around it, in every memory type of RAM
others     ``atomic_thread_fence(seq_cst)``    aarch64: ``dmb ish``
           of ``libatomic.so.1``
fallback   ``membarrier(GLOBAL_EXPEDITED)``    the kernel's ``smp_mb()`` in the calling
                                               thread; aarch64: ``dmb ish``
=========  ==================================  ============================================

Measured on x86-64: lock about 65 ns, libatomic through ctypes 160 ns, membarrier 700 ns; one fence
serves a whole batch.  A lock alone would not do on aarch64, where it acquires and releases but
lets an earlier store pass a later load.

:func:`acquire` (later accesses stay after earlier loads) and :func:`release` (earlier accesses
stay before later stores) cost nothing on x86-64, which never reorders those, and are the full
fence elsewhere.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable

__all__ = ("KIND", "acquire", "full", "release")

_SEQ_CST = 5  # memory_order_seq_cst, C11 <stdatomic.h>
_SYS_MEMBARRIER = {"aarch64": 283, "riscv64": 283, "x86_64": 324}
_GLOBAL_EXPEDITED = 2  # MEMBARRIER_CMD_GLOBAL_EXPEDITED, <linux/membarrier.h>


def by_lock() -> Callable[[], object]:
    """Fence on x86-64 only: acquire and release an uncontended lock."""
    lock = threading.Lock()
    take, release = lock.acquire, lock.release

    def fence() -> None:
        take()
        release()

    return fence


def by_libatomic() -> Callable[[], object]:
    """Return the C11 fence.  Raise :class:`OSError` or :class:`AttributeError` if it is missing."""
    call = ctypes.CDLL("libatomic.so.1").atomic_thread_fence
    call.argtypes, call.restype = [ctypes.c_int], None
    return lambda: call(_SEQ_CST)


def by_membarrier() -> Callable[[], object]:
    """Return the kernel's fence.  Raise :class:`OSError` if this kernel has none."""
    number = _SYS_MEMBARRIER.get(platform.machine())
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    if number is None or syscall(number, _GLOBAL_EXPEDITED, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "membarrier")
    return lambda: syscall(number, _GLOBAL_EXPEDITED, 0, 0)


def choose(machine: str) -> tuple[str, Callable[[], object]]:
    """Return name and call of the fastest real fence on *machine* (:func:`platform.machine`)."""
    if machine in ("x86_64", "AMD64"):
        return "lock", by_lock()
    try:
        return "libatomic", by_libatomic()
    except (OSError, AttributeError):
        return "membarrier", by_membarrier()


def _nothing() -> None:
    """Ordering that this processor keeps by itself."""


KIND, full = choose(platform.machine())
"""Which fence is in use, and the fence: nothing after it is seen before anything ahead of it."""
acquire: Callable[[], object] = _nothing if KIND == "lock" else full
release: Callable[[], object] = _nothing if KIND == "lock" else full
