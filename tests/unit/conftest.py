# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all unit tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from tests.fakes.descriptors import named_fds
from tests.fakes.memory import closed_at_the_end

from vballoon.native import guard

_before: dict[str, dict[int, str]] = {}  # the running module: what was open at its start


@pytest.fixture(autouse=True, scope="session")
def _descriptors_of_the_process_are_open() -> None:
    """Signal once, which opens a descriptor for the rest of the process; it is no test's leak."""
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    guard.signal(fd)
    os.close(fd)


@pytest.fixture(autouse=True, scope="module")
def _no_descriptor_stays_open(request: pytest.FixtureRequest) -> None:
    """Fail if the tests of a module leave descriptors open.

    The check runs when the next module starts, because a test's objects outlive its teardown.
    The garbage collector runs first, because some tests do not close their devices.
    """
    gc.collect()
    now, last = named_fds(), _before.copy()
    _before.clear()
    _before[request.module.__name__] = now
    for module, before in last.items():
        left = now.items() - before.items()
        # a failed test's traceback keeps its objects
        assert not left or request.session.testsfailed, f"left open by {module}"


@pytest.fixture(autouse=True)
def _memory_goes_with_its_test() -> Iterator[None]:
    with closed_at_the_end():
        yield
