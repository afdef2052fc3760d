# SPDX-License-Identifier: Apache-2.0
"""What happens to an attached balloon in the life of a guest: reboot, rebind, pause, company."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from tests.lab import NAMES, Machine, kexec
from tests.lab.backend import TRANSPORTS, Backend, negotiated, wait_until

from vballoon.skipmap import SkipExport

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

MIB = 1 << 20
MEMORY = 512
DRIVER = "/sys/bus/virtio/drivers/virtio_balloon"


def works(vm: Machine, backend: Backend, by: int = 64 * MIB, *, freed: bool = True) -> None:
    """Inflate, look at the guest and at the host, deflate; *freed*: pages become holes."""
    wait_until(lambda: "VIRTIO_BALLOON_F_STATS_VQ" in negotiated(backend))
    size = backend.ctl("query-balloon")["actual"]
    given = inflated(vm)
    backend.ctl("balloon", value=size - by)
    wait_until(lambda: backend.ctl("query-balloon")["actual"] == size - by)
    assert inflated(vm) - given == by // 4096  # the guest's own count
    shown = backend.ctl("query-skip-bitmap")
    assert shown["ballooned-ever"] == by // 4096
    assert shown["pages"]["ballooned"] == (by // 4096 if freed else 0)  # only holes are left out
    backend.ctl("balloon", value=size)
    wait_until(lambda: backend.ctl("query-balloon")["actual"] == size)


def inflated(vm: Machine) -> int:
    """Pages that the guest has ever put into a balloon."""
    return int(vm.guest.sh("grep balloon_inflate /proc/vmstat").split()[1])


def quiet(vm: Machine) -> None:
    """No warning of the PCI or virtio core, no oops, no broken queue."""
    log = vm.guest.sh("dmesg")
    bad = re.findall(
        r".*(?:WARNING|BUG:|Oops|Call Trace|virtio\S*: (?:\S+: )?(?:error|failed)).*", log
    )
    assert bad == [], bad


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_reboot(transport: str) -> None:
    with (
        Backend(transport) as backend,
        Machine(memory=MEMORY, reboot=True, extra=backend.device("q35")) as vm,
    ):
        vm.guest.load("virtio_balloon")
        works(vm, backend)
        size = backend.ctl("query-balloon")["actual"]
        backend.ctl("balloon", value=size - 64 * MIB)
        wait_until(lambda: backend.ctl("query-balloon")["actual"] == size - 64 * MIB)
        backend.ctl("balloon", value=size)
        backend.ctl("start-hinting")
        descriptors = len(os.listdir(f"/proc/{backend.pid}/fd"))
        vm.guest.run("(sleep 0.5; echo b >/proc/sysrq-trigger) & exit 0")
        vm.wait_until_up()
        vm.guest.load("virtio_balloon")
        works(vm, backend)
        pages = backend.ctl("query-skip-bitmap")["pages"]
        assert (pages["ballooned"], pages["hinted"]) == (0, 0)  # the old boot's bits are void
        assert len(os.listdir(f"/proc/{backend.pid}/fd")) <= descriptors + 2
        quiet(vm)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("how", ["reboot", pytest.param("kexec", marks=pytest.mark.full)])
def test_reboot_into_a_guest_without_a_driver(how: str, transport: str, tmp_path: Path) -> None:
    """No page that an export leaves out holds data of the new boot."""
    files = kexec.files() if how == "kexec" else {}
    with (
        Backend(transport) as backend,
        Machine(memory=MEMORY, reboot=True, files=files, extra=backend.device("q35")) as vm,
    ):
        vm.guest.load("virtio_balloon")
        wait_until(lambda: "VIRTIO_BALLOON_F_STATS_VQ" in negotiated(backend))
        size = backend.ctl("query-balloon")["actual"]
        backend.ctl("balloon", value=size - 192 * MIB)
        wait_until(lambda: backend.ctl("query-balloon")["actual"] == size - 192 * MIB)
        if how == "kexec":
            kexec.start(vm)
        else:
            vm.reboot()
        vm.guest.sh(
            "mkdir -p /mnt && mount -t tmpfs -o size=90% none /mnt && cd /mnt &&"
            "dd if=/dev/urandom of=seed bs=64k count=32 2>/dev/null &&"
            "for i in $(seq 150); do cat seed; done >data",
            timeout=200,
        )
        assert backend.ctl("query-balloon")["driver-running"] is False
        vm.qmp("stop")
        folder = tmp_path / "export"
        backend.export(folder)
        export = SkipExport(folder)
        skipped = export.skippable(None)
        (ram,) = vm.ram
        with ram.path.open("rb") as file:
            for index, region in enumerate(export.layout.regions):
                pages = skipped.region_extents(index).bytes().moved(-region.guest_phys_addr)
                for start, end in pages.moved(region.file_offset):
                    data = os.pread(file.fileno(), end - start, start)
                    assert data.count(0) == end - start, hex(start)
        shown = backend.ctl("query-skip-bitmap")
        if transport == "vhost-user":  # over vfio-user the reset is seen, and all bits are void
            assert shown["pages"]["ballooned"] < shown["ballooned-ever"] == 192 * MIB // 4096


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rebind_ten_times(transport: str) -> None:
    with (
        Backend(transport) as backend,
        Machine(memory=MEMORY, extra=backend.device("q35")) as vm,
    ):
        vm.guest.load("virtio_balloon")
        name = vm.guest.sh(f"cd {DRIVER} && echo virtio*")
        works(vm, backend)
        descriptors = len(os.listdir(f"/proc/{backend.pid}/fd"))
        for _ in range(10):
            vm.guest.sh(f"echo {name} >{DRIVER}/unbind && echo {name} >{DRIVER}/bind")
        works(vm, backend)
        assert len(os.listdir(f"/proc/{backend.pid}/fd")) == descriptors
        assert all(q["broken"] is None for q in backend.ctl("query-status")["queues"])
        quiet(vm)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_paused_guest_keeps_its_balloon(transport: str) -> None:
    """QEMU stops the rings of a paused guest; that is not a reset."""
    with (
        Backend(transport) as backend,
        Machine(memory=MEMORY, extra=backend.device("q35")) as vm,
    ):
        vm.guest.load("virtio_balloon")
        wait_until(lambda: "VIRTIO_BALLOON_F_STATS_VQ" in negotiated(backend))
        size = backend.ctl("query-balloon")["actual"]
        backend.ctl("balloon", value=size - 64 * MIB)
        wait_until(lambda: backend.ctl("query-balloon")["actual"] == size - 64 * MIB)
        before = backend.ctl("query-skip-bitmap")["pages"]["ballooned"]
        vm.qmp("stop")
        vm.qmp("cont")
        assert backend.ctl("query-skip-bitmap")["pages"]["ballooned"] == before
        backend.ctl("balloon", value=size)
        wait_until(lambda: backend.ctl("query-balloon")["actual"] == size)
        works(vm, backend)
        quiet(vm)


def test_one_device_on_each_transport() -> None:
    """Linux has room for one device that takes reports, so the second does not offer them."""
    with (
        Backend("vhost-user") as one,
        Backend("vfio-user", "--features=-PAGE_REPORTING") as two,
        Machine(
            memory=MEMORY,
            root_ports=2,
            extra=[
                *one.device("q35", port="rp0", id_="b0"),
                *two.device("q35", port="rp1", id_="b1"),
            ],
        ) as vm,
    ):
        vm.guest.load("virtio_balloon")
        for backend in (one, two):
            works(vm, backend)
        quiet(vm)


@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.parametrize("kernel", NAMES)
def test_the_pci_function_is_decoded_without_complaint(kernel: str, machine: str) -> None:
    """What ``lspci -vv`` makes of every capability, and MSI-X in use by the guest."""
    with (
        Backend("vfio-user") as backend,
        Machine(
            kernel=kernel,
            machine=machine,
            memory=MEMORY,
            binaries=["usr/bin/lspci"],
            extra=backend.device(machine),
        ) as vm,
    ):
        vm.guest.load("virtio_balloon")
        works(vm, backend)
        text = vm.guest.sh("lspci -vv -d 1af4:1045")
        for structure in ("CommonCfg", "Notify", "ISR", "DeviceCfg"):
            assert f"VirtIO: {structure}" in text, text
        assert "MSI-X: Enable+" in text
        # lspci has no name for VIRTIO_PCI_CAP_PCI_CFG, of QEMU's own devices neither
        assert text.count("VirtIO: <unknown>") == 1
        text = text.replace("VirtIO: <unknown>", "")
        assert not re.search(r"unknown|invalid|\?\?|<chain|access denied", text, re.I), text
        vectors = [
            line.split()
            for line in vm.guest.sh("cat /proc/interrupts").splitlines()
            if re.search(r"virtio\d+-(inflate|deflate|stats|reporting)", line)
        ]
        assert vectors, "no MSI-X vector of the balloon in /proc/interrupts"
        assert all("MSI" in " ".join(words) for words in vectors)
        assert sum(int(words[1]) for words in vectors) > 0
        quiet(vm)


def test_private_memory_works_by_messages_or_says_why_not() -> None:
    """RAM that is not shared: rings by DMA messages, and one line that nothing can be freed."""
    with (
        Backend("vfio-user") as backend,
        Machine(memory=MEMORY, backing="private", extra=backend.device("q35")) as vm,
    ):
        vm.guest.load("virtio_balloon")
        works(vm, backend, 32 * MIB, freed=False)
        words = [line for line in backend.words().splitlines() if "discard" in line.lower()]
        assert len(words) == 1, backend.words()
        quiet(vm)
