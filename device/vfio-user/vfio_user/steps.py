# SPDX-License-Identifier: Apache-2.0
"""Work in which hooks of a device may be waited for.

Such work is a generator that yields what it waits for.  :func:`finish` runs it to its end where
nothing really waits; :class:`Run` runs it with a function that lets a coroutine run (an event
loop's tasks, for one), and calls back at the end.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Generic, TypeVar

from vfio_user.errors import UsageError

__all__ = ("Done", "Run", "Spawn", "Steps", "awaited", "finish", "run_now")

T = TypeVar("T")

Steps = Generator[Awaitable[None], None, T]
Done = Callable[[BaseException | None], None]
Spawn = Callable[[Awaitable[None], Done], Callable[[], object]]
"""Let a coroutine run, call back at its end, return a function that cancels it."""


def awaited(result: Awaitable[None] | None) -> Steps[None]:
    """Wait for what a hook has returned, if it is an ``async def``."""
    if result is not None:
        yield result


def finish(steps: Steps[T]) -> T:
    """Return what *steps* return; a coroutine in them that really waits gets UsageError."""
    results: list[T] = []
    errors: list[BaseException] = []

    def end(result: T | None, error: BaseException | None) -> None:
        if error is not None:
            errors.append(error)
        else:
            results.append(result)  # type: ignore[arg-type]

    Run(steps, run_now, end)
    if errors:
        raise errors[0]
    return results[0]


class Run(Generic[T]):
    """Runs *steps* at once, as far as they do not wait; *done(result, error)* is called once."""

    def __init__(
        self,
        steps: Steps[T],
        spawn: Spawn,
        done: Callable[[T | None, BaseException | None], None],
    ) -> None:
        self.ended = False
        self._steps = steps
        self._spawn = spawn
        self._done = done
        self._advance(None)

    def _advance(self, error: BaseException | None) -> None:
        try:
            waiting = next(self._steps) if error is None else self._steps.throw(error)
        except StopIteration as end:
            self._end(end.value, None)
        except BaseException as failed:
            self._end(None, failed)
            if not isinstance(failed, Exception) and failed is not error:
                raise  # KeyboardInterrupt; a cancelled coroutine is only reported
        else:
            self._spawn(waiting, self._advance)

    def _end(self, result: T | None, error: BaseException | None) -> None:
        self.ended = True
        self._done(result, error)


def run_now(waiting: Awaitable[None], done: Done) -> Callable[[], object]:
    """Run a coroutine that does not wait to its end; one that waits ends with UsageError."""
    steps = waiting.__await__()
    try:
        next(steps)
    except StopIteration:
        done(None)
    except Exception as error:
        done(error)
    else:
        done(UsageError("a hook of the device waits, but nothing here lets it"))
    return lambda: None
