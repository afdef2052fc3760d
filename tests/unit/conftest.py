# SPDX-License-Identifier: Apache-2.0
"""What all unit tests share."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_of_other_modules() -> None:
    """Tests count descriptors; those of another module's garbage must not go in the middle."""
    gc.collect()
