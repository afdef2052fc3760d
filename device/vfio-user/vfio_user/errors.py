# SPDX-License-Identifier: Apache-2.0
"""The errors of this package.

::

    VfioUserError
    ├── RequestError     the client asked for something that cannot be done; becomes an error reply
    │   └── FatalError   and the connection cannot continue after it
    ├── DmaError         client memory could not be reached
    └── UsageError       the device was declared in a way that cannot work

A device's own callbacks may raise :class:`RequestError` with the errno that the client is to see.
"""

from __future__ import annotations

import errno as _errno
import os

__all__ = ("DmaError", "FatalError", "RequestError", "UsageError", "VfioUserError")


class VfioUserError(Exception):
    """Anything that this package raises on purpose."""


class RequestError(VfioUserError):
    """A command that is refused; *errno* goes into the reply, *text* into the log."""

    def __init__(self, errno: int, text: str) -> None:
        super().__init__(f"{text} ({_name(errno)})")
        self.errno = errno
        self.text = text


class FatalError(RequestError):
    """A message after which the byte stream or the negotiation cannot be trusted any more."""


class DmaError(VfioUserError):
    """An access to client memory that failed: outside the map, refused, or nobody there."""

    def __init__(self, errno: int, text: str) -> None:
        super().__init__(f"{text} ({_name(errno)})")
        self.errno = errno


class UsageError(VfioUserError):
    """A device declaration that cannot be served."""


def _name(number: int) -> str:
    return _errno.errorcode.get(number) or os.strerror(number)
