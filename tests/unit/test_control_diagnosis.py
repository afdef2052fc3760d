# SPDX-License-Identifier: Apache-2.0
"""Which problems a status shows: vballoon.control.diagnosis as a table."""

from __future__ import annotations

from typing import Any

import pytest

from vballoon.control.diagnosis import problems

RUNNING: dict[str, Any] = {
    "connected": True,
    "transport": "vhost-user",
    "protocol-features": ["MQ", "CONFIG"],
    "front-end-queues": 6,
    "queues": [{"index": 0, "size": 128, "broken": None}],
    "regions": [{"size": 1 << 29}],
    "driver-running": True,
}
PCI = RUNNING | {"transport": "vfio-user", "protocol-features": [], "front-end-queues": 0}
IDLE = {"queues": [{"index": 0, "size": 0, "broken": None}], "regions": [], "driver-running": False}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (RUNNING, []),
        (PCI, []),
        ({"connected": False}, ["no-front-end"]),
        (RUNNING | IDLE, ["no-driver"]),
        (PCI | IDLE, ["no-driver"]),
        (RUNNING | IDLE | {"protocol-features": [], "front-end-queues": 0}, ["silent-front-end"]),
        (RUNNING | IDLE | {"front-end-queues": 2}, ["too-few-queues", "no-driver"]),
        (RUNNING | {"protocol-features": ["MQ"]}, ["no-config-space"]),
        (RUNNING | {"regions": [], "driver-running": False}, ["memory-not-shared"]),
        (PCI | IDLE | {"memory-unmapped": True}, ["translated-addresses"]),
        (RUNNING | {"queues": [{"index": 1, "size": 8, "broken": "desc-order"}]}, ["broken-queue"]),
    ],
)
def test_problems(status, expected):
    found = problems(status)
    assert [problem.name for problem in found] == expected
    assert all(problem.what and problem.remedy for problem in found)
