# SPDX-License-Identifier: Apache-2.0
"""Declare a construct layout without importing construct, which takes a while.

``c`` is used in place of the module: ``c.Struct("size" / c.Int32ul)`` gives a
:class:`Declaration`, which builds the construct when it is first needed.  A class with such a
layout knows its field names, its size and its :mod:`struct` format from the declaration alone;
whatever is neither flat nor of a fixed size is left to construct.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

__all__ = ("Declaration", "c")

_INTEGER = re.compile(r"Int(8|16|32|64)([us])([lbn])")
_LETTERS = {"8": "b", "16": "h", "32": "l", "64": "q"}  # as construct has them
_ORDERS = {"l": "<", "b": ">", "n": "="}


class Declaration:
    """One construct that is not built yet.

    *form* is ("field", struct format), ("struct", fields), ("bytes", size), ("array", size) or
    ("rest",) where nothing is known without construct.
    """

    def __init__(
        self, make: Callable[[Any], Any], form: tuple[Any, ...] = ("rest",), name: str | None = None
    ) -> None:
        self._make = make
        self.form = form
        self.name = name
        self._built: Any = None

    def __rtruediv__(self, name: str) -> Declaration:
        """Give the field a name: ``"size" / c.Int32ul``."""
        return Declaration(lambda module: name / self.build(), self.form, name)

    def __call__(self, *args: Any, **options: Any) -> Declaration:
        """Declare a construct with parameters, any of which may be a declaration."""
        return Declaration(
            lambda module: self._make(module)(
                *map(_built, args), **{key: _built(value) for key, value in options.items()}
            ),
            _form(self.form, args),
        )

    def build(self) -> Any:
        """Return the construct, the same one each time."""
        if self._built is None:
            import construct

            self._built = self._make(construct)
        return self._built

    def __get__(self, instance: object, owner: type) -> Any:
        """Return the construct where a class has the declaration as an attribute."""
        return self.build()

    # -- what is known without construct ----------------------------------------------------------

    @property
    def fields(self) -> tuple[Declaration, ...]:
        """Return the fields of a structure, none for anything else."""
        return tuple(self.form[1]) if self.form[0] == "struct" else ()

    @property
    def size(self) -> int:
        """Return the size in bytes; -1 where it is not known or depends on the contents."""
        if self.form[0] == "struct":
            sizes = [field.size for field in self.fields]
            return -1 if -1 in sizes else sum(sizes)
        if self.form[0] == "field":
            return {"b": 1, "h": 2, "l": 4, "q": 8}[self.form[1][1].lower()]
        return self.form[1] if self.form[0] in ("bytes", "array") else -1

    @property
    def takes_rest(self) -> bool:
        """Return whether it takes all remaining bytes."""
        return self.form == ("name", "GreedyBytes")

    def flat(self, fields: tuple[Declaration, ...]) -> str | None:
        """Return one :mod:`struct` format for *fields*, None where there is none."""
        if not all(field.form[0] == "field" for field in fields):
            return None
        formats = [field.form[1] for field in fields]
        orders = {one[0] for one in formats if one[1:] not in ("B", "b")}
        if len(orders) > 1:
            return None
        return (orders.pop() if orders else "<") + "".join(one[1:] for one in formats)


def _built(value: Any) -> Any:
    return value.build() if isinstance(value, Declaration) else value


def _form(kind: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, ...]:
    match kind, args:
        case ("name", "Struct"), _:
            return "struct", args
        case ("name", "Bytes"), (int() as size,):
            return "bytes", size
        case ("name", "Array"), (int() as count, Declaration() as item) if item.size >= 0:
            return "array", count * item.size
    return ("rest",)


class _Module:
    """Offer the names of the module construct, each as a declaration."""

    def __getattr__(self, name: str) -> Declaration:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _INTEGER.fullmatch(name)
        form: tuple[Any, ...] = ("name", name)
        if found is not None:
            bits, sign, order = found.groups()
            letter = _LETTERS[bits] if sign == "s" else _LETTERS[bits].upper()
            form = ("field", _ORDERS[order] + letter)
        return Declaration(lambda module: getattr(module, name), form)


c: Any = _Module()
