# SPDX-License-Identifier: Apache-2.0
"""``--live`` on a kernel with soft-dirty marks: Debian's, in a guest that hosts a guest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.lab import Machine, userland

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3600)]
MIB = 1 << 20


@pytest.fixture(scope="module")
def host() -> Iterator[Machine]:
    with userland.machine(memory=3072, smp=2) as vm:
        vm.guest.sh("echo never >/sys/kernel/mm/transparent_hugepage/shmem_enabled || true")
        yield vm


def run_inside(host: Machine, tracker: str) -> Any:
    words = host.guest.sh(
        f"enter python -m tests.lab_tests.live_inside {tracker} 2>/run/words || cat /run/words",
        timeout=1500,
    )
    assert words.splitlines()[-1].startswith("{"), words
    return json.loads(words.splitlines()[-1])


def test_live_snapshot_under_load(host: Machine) -> None:
    """Most is copied while the guest writes; nothing of it is lost."""
    told = run_inside(host, "sound")
    assert told["source"], told
    assert told["restored"], told
    assert told["steps"].index("ask") < told["steps"].index("unplug"), told
    first, *later = told["sizes"]
    assert later, told
    assert first < 190 * MIB, told  # what the guest told free was not copied even once


def test_blind_tracker_is_noticed(host: Machine) -> None:
    """The same with a tracker that tells nothing: the restored guest is broken, and only it."""
    told = run_inside(host, "blind")
    assert told["source"], told
    assert not told["restored"], told
