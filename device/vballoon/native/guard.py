# SPDX-License-Identifier: Apache-2.0
"""What must be done in C: mappings whose pages can vanish, eventfds that can block, SIGSYS.

Memory files and eventfds belong to the front-end, which can truncate a memory file or clear
``O_NONBLOCK`` at any time.  An access to a page that is gone raises SIGBUS.  A handler written in
Python never runs, since the interpreter first returns to the faulting instruction.  The compiled
handler maps a zero page there and counts.  Whoever worked on guest memory compares :func:`faults`
before and after, and stops the queues of that guest when the number has grown.

Unlike the compiled loops this has no form in Python: :func:`install` raises
:class:`~vballoon.errors.UsageError` where the extension was not built.
"""

from __future__ import annotations

import errno
import importlib
import mmap
import os
import weakref
from typing import TYPE_CHECKING, Any, Protocol, cast

from vballoon.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("Watch", "available", "faults", "install", "report_sigsys", "signal", "watch")


class _Extension(Protocol):
    def install(self) -> None: ...

    def add(self, start: int, length: int, page: int, /) -> int: ...

    def remove(self, slot: int, /) -> None: ...

    def faults(self, slot: int | None, /) -> int: ...

    def signal(self, fd: int, /) -> int: ...

    def report_sigsys(self, prefix: bytes, /) -> None: ...


def _load() -> _Extension | None:
    try:
        return cast("_Extension", importlib.import_module("vballoon.native._guard"))
    except ImportError:
        return None


_extension = _load()
_installed = False


def available() -> bool:
    """Return whether the extension was built."""
    return _extension is not None


def install() -> None:
    """Take over SIGBUS for the mappings that are watched.

    Raise :class:`~vballoon.errors.UsageError` where the extension was not built: without it, a
    front-end that truncates its memory file ends this process.
    """
    global _installed
    if _extension is None:
        raise UsageError(
            "the compiled extension vballoon.native._guard is missing, and without it a front-end "
            "could end this process; install a C compiler and the package anew"
        )
    _extension.install()
    _installed = True


class Watch:
    """A watched mapping, for as long as the mapping exists."""

    def __init__(self, extension: _Extension, slot: int, mapping: mmap.mmap) -> None:
        self._extension, self._slot = extension, slot
        self._end = weakref.finalize(mapping, extension.remove, slot)
        self._end.atexit = False

    @property
    def faults(self) -> int:
        """How many accesses to the mapping have failed; 0 once it has gone."""
        return self._extension.faults(self._slot) if self._end.alive else 0


def watch(view: NDArray[Any], page_size: int = mmap.PAGESIZE) -> Watch | None:
    """Guard the mapping that *view* lies in, until the mapping goes.

    *view* is an array over an :class:`mmap.mmap`; *page_size* is that of the backing file, bytes.
    Return None, with nothing done, before :func:`install` and for memory that is no mapping.
    """
    mapping = _mapping_of(view)
    if _extension is None or not _installed or mapping is None:
        return None
    start = view.__array_interface__["data"][0]
    first = start - start % page_size
    length = start + view.nbytes - first
    slot = _extension.add(first, length + -length % page_size, page_size)
    return Watch(_extension, slot, mapping)


def _mapping_of(view: NDArray[Any]) -> mmap.mmap | None:
    base: Any = view
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    return base


def faults() -> int:
    """Return how many accesses to watched mappings have failed since :func:`install`."""
    return _extension.faults(None) if _extension is not None else 0


def signal(fd: int) -> int:
    """Add one to the eventfd *fd* and never block, whatever its flags and its count.

    Return 0, or the error number: ``EINVAL`` where *fd* is not an eventfd, ``EBADF`` where it is
    not open.  A full counter stays full, as the reader is awake anyway.
    """
    if _extension is not None:
        return _extension.signal(fd)
    try:
        os.eventfd_write(fd, 1)  # blocks where the front-end wants it to; `serve` refuses to run so
    except OSError as error:
        return 0 if error.errno == errno.EAGAIN else error.errno or errno.EIO
    return 0


def report_sigsys(prefix: str) -> None:
    """Write *prefix* and the system call's number to standard error when seccomp refuses one.

    The process then exits with status 159 (128 + SIGSYS). *prefix* is cut after 400 bytes.
    """
    if _extension is None:
        raise UsageError("the compiled extension vballoon.native._guard is missing")
    _extension.report_sigsys(prefix.encode("utf-8", "backslashreplace"))
