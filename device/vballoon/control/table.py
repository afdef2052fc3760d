# SPDX-License-Identifier: Apache-2.0
"""The declaration of commands (name, typed arguments, help) and the check of requests."""

from __future__ import annotations

import inspect
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vballoon.control.session import CommandError

__all__ = ("Argument", "Command", "Reply", "Table")

_JSON_NAMES = {int: "integer", str: "string", bool: "boolean"}
INT_MAX = (1 << 63) - 1
"""Largest value of QMP's ``int``, which has 64 bits."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A result and the descriptors that are sent with it, which the reply owns."""

    value: Any
    fds: tuple[int, ...] = ()


Result = Any
Run = Callable[..., Result | Awaitable[Result]]
F = TypeVar("F", bound=Run)


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument; integers are checked against [*minimum*, *maximum*]."""

    kind: type[int] | type[str] | type[bool]
    help: str
    optional: bool = False
    minimum: int = 0
    maximum: int = INT_MAX
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> None:
        """Raise :class:`CommandError` if *value* is not valid for the argument *name*."""
        expected = _JSON_NAMES[self.kind]
        if type(value) is not self.kind:
            raise CommandError(f"Invalid parameter type for '{name}', expected: {expected}")
        if (
            isinstance(value, int)
            and self.kind is int
            and not self.minimum <= value <= self.maximum
        ):
            raise CommandError(
                f"Parameter '{name}' expects a value from {self.minimum} to {self.maximum}"
            )
        if self.choices and value not in self.choices:
            raise CommandError(f"Parameter '{name}' expects one of {', '.join(self.choices)}")


@dataclass(frozen=True, slots=True)
class Command:
    """One command; *run* gets the operator and the arguments, with ``_`` for ``-`` in names."""

    name: str
    run: Run
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    same_user: bool = False
    """Refuse clients of other users than the server's and root."""

    @property
    def help(self) -> str:
        """The help text: the first paragraph of the docstring."""
        return " ".join((inspect.getdoc(self.run) or "").split("\n\n")[0].split())

    def authorize(self, user: int) -> None:
        """Raise CommandError unless a client of user id *user* may run the command."""
        if self.same_user and user not in (0, os.geteuid()):
            raise CommandError(
                f"{self.name} serves only root and the user that runs the server, not user {user}"
            )

    def bind(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Check *given* and return it as keyword arguments.  Raise CommandError if invalid."""
        for name in given:
            if name not in self.arguments:
                raise CommandError(f"Parameter '{name}' is unexpected")
        for name, argument in self.arguments.items():
            if name in given:
                argument.check(name, given[name])
            elif not argument.optional:
                raise CommandError(f"Parameter '{name}' is missing")
        return {name.replace("-", "_"): value for name, value in given.items()}

    def describe(self) -> dict[str, Any]:
        """Return the command in the form of ``query-commands``."""
        return {
            "name": self.name,
            "help": self.help,
            "arguments": [
                {
                    "name": name,
                    "type": _JSON_NAMES[argument.kind],
                    "optional": argument.optional,
                    "help": argument.help,
                }
                for name, argument in self.arguments.items()
            ],
        }


class Table:
    """All commands by name."""

    def __init__(self) -> None:
        self.commands: dict[str, Command] = {}

    def command(
        self,
        name: str,
        arguments: Mapping[str, Argument] | None = None,
        *,
        same_user: bool = False,
    ) -> Callable[[F], F]:
        """Declare the decorated function as command *name*."""

        def declare(run: F) -> F:
            self.commands[name] = Command(name, run, arguments or {}, same_user)
            return run

        return declare

    def find(self, name: str) -> Command:
        """Return the command *name*.  Raise CommandError (``CommandNotFound``) if unknown."""
        try:
            return self.commands[name]
        except KeyError:
            raise CommandError(
                f"The command {name[:80]} has not been found", "CommandNotFound"
            ) from None
