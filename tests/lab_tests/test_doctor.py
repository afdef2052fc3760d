# SPDX-License-Identifier: Apache-2.0
"""Each wrong configuration is named, with what to do, by the server and by ``vballoon doctor``."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.lab import Machine
from tests.lab.backend import Backend, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

MEMORY = 256
VT_D = "intel-iommu,intremap=off,caching-mode=on"


def doctor(*arguments: object) -> tuple[int, str]:
    """Return exit status and output of ``vballoon doctor``."""
    done = subprocess.run(
        [sys.executable, "-m", "vballoon", "doctor", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def named(backend: Backend, vm: Machine, name: str, remedy: str) -> None:
    """Require that the problem *name* is found, with *remedy*, and logged."""
    status, text = doctor(backend.control_socket)
    assert status == 1
    assert f"{name}:" in text
    assert remedy in text
    assert name in [problem["name"] for problem in backend.ctl("query-status")["problems"]]


def test_a_driver_that_is_not_loaded() -> None:
    with (
        Backend("vhost-user") as backend,
        Machine(memory=MEMORY, extra=backend.device("q35")) as vm,
    ):
        named(backend, vm, "no-driver", "load virtio_balloon")
        vm.guest.load("virtio_balloon")
        wait_until(lambda: backend.ctl("query-status")["driver-running"])
        assert doctor(backend.control_socket, "--qmp", vm.qmp_socket) == (0, "no problem found\n")
        # two wrong sockets: the device's own, and a monitor that another client uses
        status, text = doctor(backend.socket)
        assert status == 2
        assert "the device's own socket" in text.lower()
        status, text = doctor("--qmp", vm.folder / "qmp.sock")
        assert status == 2
        assert "another client, such as libvirt" in text


def test_memory_that_is_not_shared() -> None:
    with (
        Backend("vhost-user") as backend,
        Machine(memory=MEMORY, backing="private", extra=backend.device("q35")) as vm,
    ):
        vm.guest.load("virtio_balloon")
        named(backend, vm, "memory-not-shared", "share=on")
        assert doctor("--qmp", vm.qmp_socket)[0] == 1
        wait_until(lambda: "share=on" in backend.words())


@pytest.mark.full
def test_too_few_queues() -> None:
    with Backend("vhost-user") as backend:
        device = [text.replace('"num_vqs": 6', '"num_vqs": 2') for text in backend.device("q35")]
        with Machine(memory=MEMORY, extra=device) as vm:
            vm.guest.load("virtio_balloon")
            assert "failed with error -22" in vm.guest.sh("dmesg")
            named(backend, vm, "too-few-queues", "num_vqs=6")


@pytest.mark.full
def test_no_configuration_space() -> None:
    with (
        Backend("vhost-user", config_size=0) as backend,
        Machine(memory=MEMORY, extra=backend.device("q35")) as vm,
    ):
        vm.guest.load("virtio_balloon")
        named(backend, vm, "no-config-space", "config_size=24")


def test_an_iommu_of_the_guest_over_vfio_user() -> None:
    """The driver is refused, and nothing in the guest hangs."""
    with (
        Backend("vfio-user") as backend,
        Machine(
            memory=MEMORY,
            append="intel_iommu=on",
            extra=["-device", VT_D, *backend.device("q35")],
        ) as vm,
    ):
        vm.guest.load("virtio_balloon")
        assert "FEATURES_OK refused" in backend.words()
        named(backend, vm, "translated-addresses", "iommu=pt")
        assert vm.guest.sh("ls /sys/bus/virtio/drivers/virtio_balloon").split() == [
            "bind", "module", "uevent", "unbind",
        ]  # fmt: skip
        assert "blocked for more than" not in vm.guest.sh("dmesg")


@pytest.mark.full
def test_an_iommu_that_passes_addresses_through() -> None:
    with (
        Backend("vfio-user") as backend,
        Machine(
            memory=MEMORY,
            append="intel_iommu=on iommu=pt",
            extra=["-device", VT_D, *backend.device("q35")],
        ) as vm,
    ):
        vm.guest.load("virtio_balloon")
        wait_until(lambda: backend.ctl("query-guest-stats")["last-update"])
        assert doctor(backend.control_socket) == (0, "no problem found\n")
