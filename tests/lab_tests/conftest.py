# SPDX-License-Identifier: Apache-2.0
"""Which lab tests ``make test`` runs, and which only ``make test FULL=1``.

Every test runs on at least one kernel by default, and the tests named in :data:`EVERY_KERNEL` on
all of them; the rest of the matrix, and what takes minutes by its nature, is marked ``full``.
"""

from __future__ import annotations

import re

import pytest

OTHER_KERNELS = re.compile(r"[\[-](6\.1|backports)[\]-]")
EVERY_KERNEL = re.compile(
    r"test_story\[|test_builds_without_a_warning\[|test_inflates_and_deflates\[|"
    r"test_pushes_what_is_free\[\S*-4096-|test_saved_and_restored\[\S*-q35-file-module|"
    r"test_guest_answers_and_takes_a_module\[|test_the_pci_function_is_decoded\S*-q35"
)
LONG = re.compile(
    r"test_moved_twenty_times|test_stale_ranges_do_break|test_pushes_what_is_free\[\S*-8192-|"
    r"test_snapshot_faults|test_snapshot_live|test_walk_beside_hinting\[\S*fragmented"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is left to ``FULL=1``."""
    for item in items:
        name = item.nodeid
        elsewhere = OTHER_KERNELS.search(name) and not EVERY_KERNEL.search(name)
        if elsewhere or LONG.search(name):
            item.add_marker(pytest.mark.full)
