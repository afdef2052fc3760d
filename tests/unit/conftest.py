# SPDX-License-Identifier: Apache-2.0
"""What all unit tests share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from tests.fakes.descriptors import named_fds
from tests.fakes.memory import closed_at_the_end

_before: dict[str, dict[int, str]] = {}  # the module that is running: what was open when it began


@pytest.fixture(autouse=True, scope="module")
def _no_descriptor_stays_open(request: pytest.FixtureRequest) -> None:
    """What the tests of one module open, or have the product open, is closed for the next one.

    Checked when the next one begins, since a test's objects outlive its teardown.  What is
    garbage by then may be closed by the collector: not all tests close their devices.
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
