# SPDX-License-Identifier: Apache-2.0
"""Machines that people have: what works, and what is refused with a reason.

``docs/operating.md`` has the results as a table.
"""

from __future__ import annotations

import pytest
from tests.lab import Machine, kernel
from tests.lab.backend import TRANSPORTS, Backend, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.full, pytest.mark.timeout(240)]

MIB = 1 << 20
MEMORY = 512
VT_D = "intel-iommu,intremap=off,caching-mode=on"


def works(vm: Machine, backend: Backend, by: int = 64 * MIB) -> None:
    """Inflate by *by* bytes, compare with the guest's own count, and deflate."""
    wait_until(lambda: backend.ctl("query-guest-stats")["last-update"])
    size = backend.ctl("query-balloon")["actual"]
    backend.ctl("balloon", value=size - by)
    wait_until(lambda: backend.ctl("query-balloon")["actual"] == size - by)
    assert int(vm.guest.sh("grep balloon_inflate /proc/vmstat").split()[1]) == by // 4096
    assert backend.ctl("query-skip-bitmap")["pages"]["ballooned"] == by // 4096
    backend.ctl("balloon", value=size)
    wait_until(lambda: backend.ctl("query-balloon")["actual"] == size)
    assert all(queue["broken"] is None for queue in backend.ctl("query-status")["queues"])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_an_invariant_tsc(transport: str) -> None:
    with (
        Backend(transport) as backend,
        Machine(
            memory=MEMORY, cpu="qemu64", append="tsc=unstable", extra=backend.device("q35")
        ) as vm,
    ):
        vm.guest.load("virtio_balloon")
        works(vm, backend)


def test_microvm_with_virtio_mmio() -> None:
    module = {"modules/virtio_mmio.ko": kernel("6.12").module("virtio_mmio")}
    with Backend("vhost-user") as backend:
        device = [
            "-global",
            "virtio-mmio.force-legacy=false",
            "-chardev",
            f"socket,id=c0,path={backend.socket}",
            "-device",
            "vhost-user-test-device,chardev=c0,virtio-id=5,num_vqs=6,vq_size=128,config_size=24",
        ]
        with Machine(machine="microvm", memory=MEMORY, files=module, extra=device) as vm:
            vm.guest.load("virtio_balloon")
            vm.guest.sh("insmod /modules/virtio_mmio.ko")
            works(vm, backend)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_with_virtio_iommu(transport: str) -> None:
    """The guest's driver for the IOMMU is loaded before any device's."""
    guest_kernel = kernel("6.12")
    names = guest_kernel.with_dependencies(["virtio_pci", "virtio_iommu"])
    modules = {f"iommu/{name}.ko": guest_kernel.module(name) for name in names}
    with (
        Backend(transport) as backend,
        Machine(
            memory=MEMORY,
            files=modules,
            extra=["-device", "virtio-iommu-pci,addr=0x1e", *backend.device("q35")],
        ) as vm,
    ):
        for name in names:
            vm.guest.sh(f"[ -d /sys/module/{name} ] || insmod /iommu/{name}.ko")
        vm.guest.load("virtio_balloon")
        if transport == "vhost-user":
            works(vm, backend)
        else:  # refused with a reason
            assert "FEATURES_OK refused" in backend.words()
            found = [problem["name"] for problem in backend.ctl("query-status")["problems"]]
            assert found == ["translated-addresses"]


def test_vhost_user_does_not_use_the_guests_iommu() -> None:
    with (
        Backend("vhost-user") as backend,
        Machine(
            memory=MEMORY,
            append="intel_iommu=on",
            extra=["-device", VT_D, *backend.device("q35")],
        ) as vm,
    ):
        vm.guest.load("virtio_balloon")
        works(vm, backend)
