# SPDX-License-Identifier: Apache-2.0
"""Snapshots after a reboot must not use the page structures of the previous kernel.

They may still be in memory unchanged, and would verify although they describe a dead kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab import NAMES, Machine
from tests.lab.backend import Backend, wait_until
from tests.lab_tests.snapshot_lab import balloon_guest, guest_module

from vballoon.control.client import ControlClient
from vballoon.snapshot.memmap import VerificationRefused
from vballoon.snapshot.source import GuestSource

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]
MANY = 10_000
"""Pages.  A guest of 256 MiB has more free pages than this."""


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend("vhost-user", "--no-discard") as served:
        yield served


@pytest.fixture(params=NAMES)
def vm(request: pytest.FixtureRequest, backend: Backend, tmp_path: Path) -> Iterator[Machine]:
    """Boot a guest that has reported its layout and may restart."""
    module = guest_module(request.param, tmp_path)
    with balloon_guest(
        backend, module=module, kernel=request.param, memory=256, reboot=True
    ) as made:
        wait_until(lambda: known(backend))
        yield made


def known(backend: Backend) -> bool:
    """Return whether a snapshot that begins now gets a layout."""
    with ControlClient(backend.control_socket) as control, GuestSource.fetch(control) as source:
        return source.layout is not None


def test_kernel_that_restarts_voids_its_layout(vm: Machine, backend: Backend) -> None:
    """An orderly reboot, as before kexec: even a copy of the layout taken earlier is refused."""
    with ControlClient(backend.control_socket) as control, GuestSource.fetch(control) as source:
        vm.qmp("stop")
        assert source.free_memory().pages > MANY
        vm.qmp("cont")
        vm.guest.post("reboot -f")
        vm.monitor.wait_event("RESET", timeout=60)
        vm.qmp("stop")
        with pytest.raises(VerificationRefused, match="witness"):
            source.free_memory()


def test_layout_from_before_a_reset_is_not_returned(vm: Machine, backend: Backend) -> None:
    """A hard reset leaves the old page structures in memory, including the witness."""
    with ControlClient(backend.control_socket) as control, GuestSource.fetch(control) as source:
        vm.qmp("system_reset")
        vm.monitor.wait_event("RESET", timeout=60)
        assert not known(backend)
        vm.qmp("stop")
        assert (
            source.free_memory().pages > MANY
        )  # verifies, so only withholding the layout protects
