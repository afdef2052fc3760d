# SPDX-License-Identifier: Apache-2.0
"""What the next keeper must know: which owner in the store is which machine."""

from __future__ import annotations

import json

from vballoon.keeper.journal import Journal, JournalError

__all__ = ("Record",)

_VERSION = 1
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


class Record:
    """The keys of machines, in a journal of its own: *fd* (taken over), or a new one.

    Raise JournalError if *fd* does not contain such a record.
    """

    def __init__(self, fd: int | None = None) -> None:
        self._journal = Journal(fd, _VERSION) if fd is not None else Journal.create(_VERSION)
        self._keys: dict[str, str] = {}
        self._next = 0
        if self._journal.content is not None:
            self._keys, self._next = _parse(self._journal.content)

    @property
    def fd(self) -> int:
        """The journal's memfd, which stays the record's."""
        return self._journal.fd

    def key_of(self, name: str) -> str:
        """Return the key of the machine *name*: the one that it had, or a new one."""
        if name not in self._keys:
            self._keys[name] = _key(self._next)
            self._next += 1
            self._write()
        return self._keys[name]

    def forget(self, name: str) -> None:
        """Give up the key of the machine *name*."""
        if self._keys.pop(name, None) is not None:
            self._write()

    def _write(self) -> None:
        self._journal.write(json.dumps({"keys": self._keys, "next": self._next}).encode())


def _parse(content: bytes) -> tuple[dict[str, str], int]:
    """Return the keys by name, and the number of the next one."""
    try:
        saved = json.loads(content)
        keys, number = saved["keys"], saved["next"]
        valid = type(number) is int and 0 <= number < 1 << 31
        if not valid or not all(isinstance(part, str) for pair in keys.items() for part in pair):
            raise ValueError("keys")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise JournalError(f"the keeper's record is malformed: {error!r}") from None
    return dict(keys), number


def _key(number: int) -> str:
    """Return a short key: the names of all machines must fit into one environment string."""
    key = ""
    while True:
        number, digit = divmod(number, len(_DIGITS))
        key = _DIGITS[digit] + key
        if not number:
            return key
