# SPDX-License-Identifier: Apache-2.0
"""Page structures of a kernel that is gone: still in memory, still true, and never believed."""

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
"""Pages: a guest of 256 MiB has more than that free."""


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
    """Whether a snapshot that begins now gets a layout."""
    with ControlClient(backend.control_socket) as control, GuestSource.fetch(control) as source:
        return source.layout is not None


def test_kernel_that_restarts_voids_its_layout(vm: Machine, backend: Backend) -> None:
    """A reboot in good order, as before kexec: then not even a copy of the layout is of use."""
    with ControlClient(backend.control_socket) as control, GuestSource.fetch(control) as source:
        vm.qmp("stop")
        assert source.free_memory().pages > MANY
        vm.qmp("cont")
        vm.guest.post("reboot -f")
        vm.monitor.wait_event("RESET", timeout=60)
        vm.qmp("stop")
        with pytest.raises(VerificationRefused, match="witness"):
            source.free_memory()


def test_layout_of_before_a_reset_is_not_handed_out(vm: Machine, backend: Backend) -> None:
    """The guest is not asked; its page structures stay as they were, down to the witness."""
    with ControlClient(backend.control_socket) as control, GuestSource.fetch(control) as source:
        vm.qmp("system_reset")
        vm.monitor.wait_event("RESET", timeout=60)
        assert not known(backend)
        vm.qmp("stop")
        assert source.free_memory().pages > MANY  # that is what must not be believed
