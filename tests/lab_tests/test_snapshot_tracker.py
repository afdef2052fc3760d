# SPDX-License-Identifier: Apache-2.0
"""Which memory's writes are tracked, on a kernel with soft-dirty marks: Debian's, in a guest."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.lab import userland
from tests.lab_tests.tracker_inside import PAGES

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]
SOUND, UNSOUND = ("memfd", "tmpfs"), ("hugetlb", "tmpfs huge=always")


@pytest.fixture(scope="module")
def found() -> Any:
    with userland.machine(memory=2048, smp=2) as host:
        host.guest.sh("echo never >/sys/kernel/mm/transparent_hugepage/shmem_enabled || true")
        done = host.guest.run("enter python -m tests.lab_tests.tracker_inside", timeout=600)
    assert done.status == 0, done
    return json.loads(done.out.splitlines()[-1])


@pytest.mark.parametrize("kind", SOUND)
def test_every_write_is_found(found: Any, kind: str) -> None:
    for way in ("checked", "proved", "neither"):
        assert found[kind][way] == {"said": "", "found": PAGES}, found


@pytest.mark.parametrize("kind", UNSOUND)
def test_memory_that_loses_marks_is_refused(found: Any, kind: str) -> None:
    assert "no live snapshot here" in found[kind]["checked"]["said"], found


def test_proof_alone_refuses_hugetlb(found: Any) -> None:
    """As it would any kind of memory that nobody has thought of."""
    assert "not tracked reliably" in found["hugetlb"]["proved"]["said"], found


def test_hugetlb_does_lose_marks(found: Any) -> None:
    """The kernel behaves as the checks assume: without them, no write would be found."""
    assert found["hugetlb"]["neither"] == {"said": "", "found": 0}, found
