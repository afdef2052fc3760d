# SPDX-License-Identifier: Apache-2.0
"""Which targets are accepted: vballoon.balloon.target as tables."""

from __future__ import annotations

import pytest

from vballoon.balloon.target import Guest, check, floor, inherited, size
from vballoon.errors import UsageError
from vballoon.sizes import Limits, parse_limits

MIB, GIB = 1 << 20, 1 << 30
NONE = Limits()
BOOTED = Guest(GIB, 980 * MIB, 900 * MIB)
"""1 GiB of which 80 MiB are used and 44 MiB are the kernel's."""
INFLATED = Guest(GIB, 468 * MIB, 388 * MIB, ballooned=512 * MIB)
INFLATED_ON_OOM = Guest(GIB, 980 * MIB, 388 * MIB, ballooned=512 * MIB, total_has_balloon=True)
VIRTIO_MEM = Guest(1536 * MIB, 470 * MIB, 400 * MIB)
"""-m 512M and 1 GiB of virtio-mem that is not plugged."""
LIAR = Guest(GIB, (1 << 64) - 1, (1 << 64) - 1)
MUTE = Guest(GIB)


@pytest.mark.parametrize(
    ("guest", "limits", "expected"),
    [
        (BOOTED, NONE, GIB),
        (INFLATED, NONE, GIB),
        (INFLATED_ON_OOM, NONE, GIB),
        (VIRTIO_MEM, NONE, 470 * MIB),
        (VIRTIO_MEM, Limits(memory=512 * MIB), 512 * MIB),
        (MUTE, NONE, GIB),
        (MUTE, Limits(memory=2 * GIB), GIB),
        (LIAR, NONE, GIB),
        (Guest(GIB, 0, 0), NONE, GIB),
        (Guest(0), NONE, 0),
    ],
)
def test_size(guest, limits, expected):
    assert size(guest, limits) == expected


@pytest.mark.parametrize(
    ("guest", "limits", "expected"),
    [
        (BOOTED, NONE, (1024 - 900 + 32) * MIB),
        (INFLATED, NONE, (1024 - 900 + 32) * MIB),
        (INFLATED_ON_OOM, NONE, (1024 - 900 + 32) * MIB),
        (VIRTIO_MEM, NONE, (470 - 400 + 32) * MIB),
        (MUTE, NONE, 256 * MIB),
        (MUTE, Limits(minimum=100 * MIB), 100 * MIB),
        (BOOTED, Limits(minimum=2 * GIB), GIB),
        (LIAR, NONE, 0),
        (Guest(GIB, 980 * MIB, 0), NONE, GIB),
    ],
)
def test_floor(guest, limits, expected):
    assert floor(guest, limits) == expected


@pytest.mark.parametrize(
    ("value", "guest", "limits", "says"),
    [
        (512 * MIB, BOOTED, NONE, None),
        (GIB, BOOTED, NONE, None),
        (156 * MIB, BOOTED, NONE, None),
        (156 * MIB - 1, BOOTED, NONE, "what the guest uses plus a margin; force=true"),
        (512, BOOTED, NONE, "did you mean 512M?"),
        (1, BOOTED, NONE, "less than 1 MiB"),
        (8 * GIB, BOOTED, NONE, "above the guest's memory, 1 GiB"),
        (GIB, BOOTED, Limits(maximum=768 * MIB), "the maximum of this machine, 768 MiB"),
        (200 * MIB, BOOTED, Limits(minimum=256 * MIB), "the minimum of this machine"),
        (120 * MIB, BOOTED, Limits(minimum=100 * MIB), None),
        (200 * MIB, MUTE, NONE, "has reported no statistics"),
        (512 * MIB, VIRTIO_MEM, NONE, None),
        (GIB, VIRTIO_MEM, Limits(memory=512 * MIB), "above the guest's memory, 512 MiB"),
        (50 * MIB, VIRTIO_MEM, NONE, "below 102 MiB"),
    ],
)
def test_check(value, guest, limits, says):
    if says is None:
        check(value, guest, limits, now=GIB)
        return
    with pytest.raises(UsageError) as refused:
        check(value, guest, limits, now=GIB)
    assert says in str(refused.value)


def test_a_target_that_gives_memory_back_needs_no_floor():
    check(100 * MIB, BOOTED, NONE, now=90 * MIB)
    with pytest.raises(UsageError):
        check(80 * MIB, BOOTED, NONE, now=90 * MIB)


@pytest.mark.parametrize(
    ("wanted", "assumed", "guest", "expected"),
    [
        (512 * MIB, GIB, BOOTED, 512 * MIB),
        (3 * GIB, 4 * GIB, Guest(4 * GIB, 146 * MIB, 100 * MIB), 68 * MIB),
        (3 * GIB, 4 * GIB, Guest(4 * GIB, 146 * MIB, 20 * MIB), 0),
        (16 * MIB, 4 * GIB, Guest(4 * GIB, 146 * MIB, 100 * MIB), 16 * MIB),
        (GIB, 1536 * MIB, VIRTIO_MEM, 368 * MIB),
        (GIB, 4 * GIB, Guest(4 * GIB), GIB),
    ],
)
def test_inherited(wanted, assumed, guest, expected):
    assert inherited(wanted, assumed, guest) == expected


def test_limits_of_the_operator():
    assert parse_limits({}) == NONE
    given = {"min": "256M", "max": "2G", "memory": "4294967296", "client": True}
    assert parse_limits(given) == Limits(256 * MIB, 2 * GIB, 4 * GIB)


@pytest.mark.parametrize("options", [{"min": "512"}, {"max": "lots"}, {"min": "2G", "max": "1G"}])
def test_limits_that_make_no_sense(options):
    with pytest.raises(UsageError, match=r"min|max"):
        parse_limits(options)
