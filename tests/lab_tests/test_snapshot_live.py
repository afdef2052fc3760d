# SPDX-License-Identifier: Apache-2.0
"""``--live`` on a kernel with soft-dirty marks: Debian's kernel, which runs the nested guest."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.lab import userland

pytestmark = [pytest.mark.lab, pytest.mark.timeout(2700)]
MIB = 1 << 20
INNER = 192
"""Memory of the nested guest, in MiB."""


@pytest.fixture(scope="module")
def told() -> Any:
    """Return the report of ``live_inside``: a live snapshot with each tracker, both restored."""
    with userland.machine(memory=2048, smp=2) as host:
        host.guest.sh("echo never >/sys/kernel/mm/transparent_hugepage/shmem_enabled || true")
        done = host.guest.run("enter python -m tests.lab_tests.live_inside", timeout=2400)
    print(done.err)
    assert done.status == 0, done
    return json.loads(done.out.splitlines()[-1])


def test_live_snapshot_under_load(told: Any) -> None:
    """Most pages are copied while the guest writes, and no write is lost."""
    sound = told["sound"]
    assert sound["source"], sound
    assert sound["restored"], sound
    assert sound["steps"].index("ask") < sound["steps"].index("unplug"), sound
    first, *later = sound["sizes"]
    assert later, sound
    assert first < (INNER - 40) * MIB, sound  # pages reported free were never copied


def test_blind_tracker_is_noticed(told: Any) -> None:
    """With a tracker that reports no writes, the restored guest is broken, the source is not."""
    blind = told["blind"]
    assert blind["source"], blind
    assert not blind["restored"], blind
