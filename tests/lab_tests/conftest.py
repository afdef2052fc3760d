# SPDX-License-Identifier: Apache-2.0
"""Which lab tests ``make test`` runs, and which only ``make test FULL=1``.

By default: the attach story on every kernel, machine and transport, the life of a guest, the lab
itself, and of the module and of snapshots the tests in :data:`HEARTS`.  The rest of their matrix,
and what takes minutes by its nature, is marked ``full``.
"""

from __future__ import annotations

import re

import pytest

OTHER_KERNELS = re.compile(r"[\[-](6\.1|backports)[\]-]")
EVERY_KERNEL = re.compile(
    r"test_story\[|test_builds_without_a_warning\[|test_guest_answers_and_takes_a_module\[|"
    r"test_the_pci_function_is_decoded\S*-q35"
)
LONG = re.compile(r"test_kmod_(stock|walk|versus_hinting|faults)\.py|test_snapshot\w*\.py")
HEARTS = re.compile(
    r"test_inflates_and_deflates\[|test_a_host_that_takes_no_hints\w+\[6\.12|"
    r"test_pushes_what_is_free\[\S*-4096-1-1|"
    r"test_saved_and_restored\[6\.12-q35-file-module|test_moved_through_a_pipe|"
    r"test_killed_at_any_step\[|test_full_disk|test_interrupted|"
    r"test_snapshot_reboot\.py::\w+\[6\.12"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is left to ``FULL=1``."""
    for item in items:
        name = item.nodeid
        elsewhere = OTHER_KERNELS.search(name) and not EVERY_KERNEL.search(name)
        if (elsewhere or LONG.search(name)) and not HEARTS.search(name):
            item.add_marker(pytest.mark.full)
