# SPDX-License-Identifier: Apache-2.0
"""Targets that would take a guest what it needs: refused, or limited, on stock QEMU."""

from __future__ import annotations

import pytest
from tests.lab import Machine, kexec
from tests.lab.backend import TRANSPORTS, Backend, wait_until

from vballoon.control import ControlClient
from vballoon.errors import UsageError

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

MIB = 1 << 20
MEMORY = 512


def refused(backend: Backend, value: int) -> str:
    """Return the reason for which the target *value* is refused."""
    with (
        ControlClient(backend.control_socket, timeout=60) as client,
        pytest.raises(UsageError) as error,
    ):
        client.execute("balloon", {"value": value})
    return str(error.value)


def settled(backend: Backend) -> int:
    """Return the size in bytes that the guest has once its balloon is as large as wanted."""

    def reached() -> bool:
        shown = backend.ctl("query-balloon")
        return bool(shown["actual"] == shown["target"])

    wait_until(reached)
    return int(backend.ctl("query-balloon")["actual"])


def stats(backend: Backend) -> None:
    """Wait until the driver has reported its memory."""
    wait_until(lambda: backend.ctl("query-guest-stats")["last-update"])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_careless_target_is_refused_with_a_reason(transport: str) -> None:
    with (
        Backend(transport) as backend,
        Machine(memory=MEMORY, extra=backend.device("q35")) as vm,
    ):
        early = refused(backend, 400 * MIB)  # QEMU shares memory when a driver starts, or before
        assert "no balloon driver runs" in early or "no guest memory yet" in early
        vm.guest.load("virtio_balloon")
        stats(backend)
        assert "did you mean 400M" in refused(backend, 400)
        assert "less than 1 MiB" in refused(backend, 1)
        assert "is above the guest's memory, 512" in refused(backend, 8 << 30)
        assert "what the guest uses plus a margin" in refused(backend, 16 * MIB)
        assert 0 <= backend.ctl("query-balloon")["target"] - MEMORY * MIB < MIB  # ROMs count too
        floor = backend.ctl("query-balloon")["floor"]
        backend.ctl("balloon", value=floor + 16 * MIB)
        assert abs(settled(backend) - floor - 16 * MIB) < 2 * MIB
        assert vm.guest.meminfo()["MemAvailable"] > 16 * MIB


@pytest.mark.parametrize(
    "given", [pytest.param(True, marks=pytest.mark.full), False], ids=["memory", "statistics"]
)
def test_unplugged_memory_is_not_the_guests(given: bool) -> None:
    """A target of all the guest's RAM takes nothing, although 1 GiB more can be plugged."""
    options = [f"--memory={MEMORY}M"] if given else []
    plugged = [
        "-m", f"{MEMORY}M,slots=2,maxmem=4G",
        "-object", "memory-backend-memfd,id=vmem,size=1G,share=on",
        "-device", "virtio-mem-pci,memdev=vmem,id=vm0,requested-size=0",
    ]  # fmt: skip
    with (
        Backend("vhost-user", *options) as backend,
        Machine(memory=MEMORY, extra=[*plugged, *backend.device("q35")]) as vm,
    ):
        vm.guest.load("virtio_mem")
        vm.guest.load("virtio_balloon")
        stats(backend)
        assert backend.ctl("query-status")["guest-size"] == (MEMORY + 1024) * MIB
        size = backend.ctl("query-balloon")["guest-memory"]
        assert size <= MEMORY * MIB
        backend.ctl("balloon", value=MEMORY * MIB)
        assert settled(backend) == size
        backend.ctl("balloon", value=size - 64 * MIB)
        assert settled(backend) == size - 64 * MIB
        assert vm.guest.meminfo()["MemAvailable"] > 100 * MIB


def test_a_crash_kernel_does_not_inherit_the_target() -> None:
    """A kernel that sees 192 of 1024 MiB keeps what it needs, whatever the target was."""
    with (
        Backend("vhost-user") as backend,
        Machine(memory=1024, files=kexec.files(), extra=backend.device("q35")) as vm,
    ):
        vm.guest.load("virtio_balloon")
        stats(backend)
        backend.ctl("balloon", value=512 * MIB)
        assert settled(backend) == 512 * MIB
        kexec.start(vm, "mem=192M")
        vm.guest.load("virtio_balloon")
        wait_until(lambda: "is limited to" in backend.words())
        settled(backend)
        assert vm.guest.meminfo()["MemAvailable"] > 24 * MIB
        assert vm.guest.run("dmesg | grep -c 'Out of puff'").text == "0"
