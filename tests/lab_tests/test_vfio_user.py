# SPDX-License-Identifier: Apache-2.0
"""Devices of ``examples/`` in front of real guests: virtio-rng on both transports, edu, DMA.

The guest's drivers are the stock ones: ``virtio_rng`` and ``uio_pci_generic``.
"""

from __future__ import annotations

import asyncio
import json
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.lab import NAMES, Machine

from vfio_user.client import Client
from vfio_user.ram import Ram
from vfio_user.requests import read_state, region_read, region_write, set_state, write_state
from virtio_formats.vfio_user import DeviceState, PciRegion

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

EXAMPLES = Path(__file__).parents[2] / "examples"
COMPLAINTS = (
    "dmesg | grep -iE 'virtio|1af4|1234:11e8' | grep -iE 'warn|fail|error|invalid|bug' || true"
)


@contextmanager
def example(name: str, option: str, *more: str) -> Iterator[tuple[Path, Path]]:
    """Run an example; its socket and its log."""
    folder = Path(tempfile.mkdtemp(prefix="vfio-"))
    sock, words = folder / "dev.sock", folder / "log"
    with words.open("wb") as out:
        program = subprocess.Popen(
            [sys.executable, EXAMPLES / name, option, sock, *more], stdout=out, stderr=out
        )
    try:
        deadline = time.monotonic() + 20
        while not sock.exists():
            assert program.poll() is None, words.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield sock, words
    finally:
        program.terminate()
        program.wait(10)
    assert "Traceback" not in words.read_text(), words.read_text()


def vfio_user(sock: Path, **more: str) -> list[str]:
    device = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(sock)}, **more}
    return ["-device", json.dumps(device)]


def vhost_user(sock: Path) -> list[str]:
    device = "vhost-user-test-device-pci,chardev=c0,virtio-id=4,num_vqs=1,vq_size=64"
    return ["-chardev", f"socket,id=c0,path={sock}", "-device", device]


def use_rng(vm: Machine) -> None:
    """Two reads differ and are not all zero: somebody fills the buffers."""
    sums = {vm.guest.sh("dd if=/dev/hwrng bs=4096 count=1 2>/dev/null | md5sum") for _ in range(2)}
    empty = vm.guest.sh("dd if=/dev/zero bs=4096 count=1 2>/dev/null | md5sum")
    assert len(sums) == 2
    assert empty not in sums


@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.parametrize("kernel", NAMES)
def test_rng_over_vfio_user(kernel: str, machine: str) -> None:
    """Entropy, MSI-X, a clean decode by lspci, ten times unbound and bound, and a reboot."""
    with (
        example("rng.py", "--vfio-user") as (sock, _),
        Machine(
            kernel=kernel,
            machine=machine,
            memory=512,
            reboot=True,
            extra=vfio_user(sock),
            binaries=["usr/bin/lspci"],
        ) as vm,
    ):
        vm.guest.load("virtio_rng")
        use_rng(vm)
        lines = vm.guest.sh("grep virtio0 /proc/interrupts").splitlines()
        assert {line.split()[-1] for line in lines} == {"virtio0-config", "virtio0-input"}
        assert all("MSI" in line for line in lines)
        decoded = vm.guest.sh("lspci -vv -d 1af4:1044 2>&1")
        assert "MSI-X: Enable+ Count=2 Masked-" in decoded
        for part in ("CommonCfg", "Notify", "ISR", "Power Management", "Express (v2)"):
            assert part in decoded
        assert not re.search("access denied|invalid|unknown header|!!!", decoded), decoded
        for _ in range(10):  # not faster: 6.1 oopses in hwrng, with QEMU's own device, too
            vm.guest.sh("cd /sys/bus/virtio/drivers/virtio_rng; echo virtio0 >unbind; sleep 0.1")
            vm.guest.sh("cd /sys/bus/virtio/drivers/virtio_rng; echo virtio0 >bind; sleep 0.1")
        use_rng(vm)
        assert vm.guest.sh(COMPLAINTS) == ""
        vm.reboot()
        vm.guest.load("virtio_rng")
        use_rng(vm)
        assert vm.guest.sh(COMPLAINTS) == ""


def test_rng_over_vhost_user() -> None:
    """The same file on the other transport."""
    with (
        example("rng.py", "--vhost-user") as (sock, _),
        Machine(kernel="6.12", memory=512, extra=vhost_user(sock)) as vm,
    ):
        vm.guest.load("virtio_rng")
        use_rng(vm)


def test_one_on_each_transport() -> None:
    """Both in one guest at a time."""
    with (
        example("rng.py", "--vhost-user") as (first, _),
        example("rng.py", "--vfio-user") as (second, _),
        Machine(kernel="6.12", memory=512, extra=[*vhost_user(first), *vfio_user(second)]) as vm,
    ):
        vm.guest.load("virtio_rng")
        for number in (0, 1):
            where = "/sys/class/misc/hw_random/rng_current"
            vm.guest.sh(f"echo virtio_rng.{number} >{where}; grep -q rng.{number} {where}")
            use_rng(vm)


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_rng_without_shared_memory(machine: str) -> None:
    """``share=off``: the file that QEMU sends is not what the guest uses, so messages are."""
    with (
        example("rng.py", "--vfio-user") as (sock, words),
        Machine(
            kernel="6.12", machine=machine, memory=512, backing="private", extra=vfio_user(sock)
        ) as vm,
    ):
        vm.guest.load("virtio_rng")
        use_rng(vm)
        assert words.read_text().count("not shared") == 1


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_rng_comes_and_goes(machine: str) -> None:
    """Hot-plug and unplug with INTx; the device outlives its client.

    With MSI-X, QEMU 11.1.3 aborts when it lets go of a ``vfio-user-pci`` device (an assertion in
    ``memory_region_del_subregion``): see docs/vfio-user.md.
    """
    port = {"bus": "rp0"} if machine == "q35" else {}
    with (
        example("rng.py", "--vfio-user", "--intx") as (sock, words),
        Machine(kernel="6.12", machine=machine, memory=512) as vm,
    ):
        vm.guest.load("virtio_rng")
        for round_ in range(3):
            vm.qmp(
                "device_add",
                driver="vfio-user-pci",
                id="rng0",
                socket={"type": "unix", "path": str(sock)},
                **port,
            )
            vm.guest.wait_for("grep -q virtio_rng /sys/class/misc/hw_random/rng_available", 30)
            use_rng(vm)
            assert "IO-APIC" in vm.guest.sh("grep virtio /proc/interrupts")
            vm.qmp("device_del", id="rng0")
            vm.monitor.wait_event("DEVICE_DELETED", device="rng0")
            assert words.read_text().count("client connected") == round_ + 1
        assert "error recovery" not in (vm.folder / "qemu.log").read_text()


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_edu(machine: str) -> None:
    """Registers, INTx through a stock driver, and DMA both ways, without any virtio."""
    with (
        example("edu.py", "--socket-path") as (sock, _),
        Machine(
            kernel="6.12",
            machine=machine,
            memory=512,
            extra=vfio_user(sock),
            binaries=["usr/bin/lspci", "usr/bin/setpci"],
        ) as vm,
    ):
        slot = vm.guest.sh("lspci -n -d 1234:11e8").split()[0]
        folder = f"/sys/bus/pci/devices/0000:{slot}"
        vm.guest.sh("load uio_pci_generic; load uio")
        vm.guest.sh("echo 1234 11e8 >/sys/bus/pci/drivers/uio_pci_generic/new_id")
        vm.guest.sh(f"setpci -s {slot} COMMAND=6:6; echo 1 >{folder}/enable; mdev -s || true")
        base = int(vm.guest.sh(f"head -n1 {folder}/resource").split()[0], 16)

        def peek(offset: int, width: int = 32) -> int:
            return int(vm.guest.sh(f"devmem {base + offset:#x} {width}"), 16)

        def poke(offset: int, value: int, width: int = 32) -> None:
            vm.guest.sh(f"devmem {base + offset:#x} {width} {value:#x}")

        assert peek(0x00) == 0x010000ED
        poke(0x04, 0x12345678)
        assert peek(0x04) == 0xEDCBA987
        poke(0x08, 6)
        assert peek(0x08) == 720
        interrupt(vm, slot, lambda: poke(0x60, 0x7), lambda: poke(0x64, 0x7))
        dma(vm, peek, poke)
        assert vm.guest.sh(COMPLAINTS) == ""


@pytest.mark.parametrize("machine", ["q35"])
def test_dma_engine(machine: str) -> None:
    """A copy of guest memory, MSI-X, a function level reset, and a move to another server.

    A client has left the device in STOP_COPY before: QEMU's reset revives it.  No driver of the
    guest uses MSI-X here; the message is a write to memory, so it is sent to memory.
    """
    with (
        example("dma_engine.py", "--socket-path") as (sock, _),
        example("dma_engine.py", "--socket-path") as (other, _),
        left_in_stop_copy(sock),
        Machine(
            kernel="6.12",
            machine=machine,
            memory=512,
            extra=vfio_user(sock),
            binaries=["usr/bin/lspci", "usr/bin/setpci"],
        ) as vm,
    ):
        slot = vm.guest.sh("lspci -n -d 1234:0dae").split()[0]
        folder = f"/sys/bus/pci/devices/0000:{slot}"
        vm.guest.sh(f"setpci -s {slot} COMMAND=6:6; echo 1 >{folder}/enable")
        resources = vm.guest.sh(f"head -n2 {folder}/resource").split()
        registers, table = int(resources[0], 16), int(resources[3], 16)
        source, destination, message = 0x20000, 0x30000, 0x40000
        with open(vm.ram[0].path, "r+b") as ram:
            ram.seek(source)
            ram.write(bytes(range(256)))
        writes = {table: message, table + 4: 0, table + 8: 0xCAFE, table + 12: 0}
        for address, value in writes.items():
            vm.guest.sh(f"devmem {address:#x} 32 {value:#x}")
        vm.guest.sh(f"setpci -s {slot} CAP_MSIX+2.w=8000")
        for offset, value in {0: source, 8: destination, 16: 256, 24: 1}.items():
            vm.guest.sh(f"devmem {registers + offset:#x} 64 {value:#x}")
        vm.guest.wait_for(f"devmem {message:#x} 32 | grep -qi cafe", 10)
        assert int(vm.guest.sh(f"devmem {registers + 24:#x} 32"), 16) == 0
        with open(vm.ram[0].path, "rb") as ram:
            ram.seek(destination)
            assert ram.read(256) == bytes(range(256))
        vm.guest.sh(f"echo 1 >{folder}/reset")
        assert int(vm.guest.sh(f"devmem {registers:#x} 64"), 16) == 0
        assert vm.guest.sh("dmesg | grep -i 1234:0dae | grep -iE 'fail|error' || true") == ""
        for offset, value in {0: 0xA000, 8: 0xB000, 16: 64}.items():  # for the other server
            vm.guest.sh(f"devmem {registers + offset:#x} 64 {value:#x}")
        vm.quit()
        asyncio.run(move(sock, other, struct.pack("<QQQ", 0xA000, 0xB000, 64)))


async def move(here: Path, there: Path, registers: bytes) -> None:
    """Move what the guest has left in one server into another, which continues with it."""
    async with await Client.connect(here) as client:
        assert await client.call(region_read(PciRegion.BAR0, 0, 24)) == registers
        await client.call(set_state(DeviceState.STOP_COPY))
        state = await client.call(read_state(1 << 16))
    async with await Client.connect(there) as client:
        assert await client.call(region_read(PciRegion.BAR0, 0, 24)) == bytes(24)
        await client.call(set_state(DeviceState.RESUMING))
        await client.call(write_state(state))
        await client.call(set_state(DeviceState.RUNNING))
        assert await client.call(region_read(PciRegion.BAR0, 0, 24)) == registers
        ram = Ram(0xA000, 0x2000)
        ram.write(0xA000, bytes(range(64)))
        await client.map(ram)
        await client.call(region_write(PciRegion.BAR0, 24, b"\1"))
        while await client.call(region_read(PciRegion.BAR0, 24, 1)) == b"\1":
            pass  # each question is served after the work that was deferred before it
        assert ram.read(0xB000, 64) == bytes(range(64))
        ram.close()


@contextmanager
def left_in_stop_copy(sock: Path) -> Iterator[None]:
    """Have a client stop the device, save its state, and disconnect."""

    async def stop() -> None:
        async with await Client.connect(sock) as client:
            await client.call(set_state(DeviceState.STOP_COPY))
            state = await client.call(read_state(4096))
            assert len(state) > 32

    asyncio.run(stop())
    yield


def interrupt(vm: Machine, slot: str, raise_it, acknowledge) -> None:  # type: ignore[no-untyped-def]
    """uio_pci_generic counts, and masks INTx by the Command register until it is enabled again."""

    def count() -> int:
        found = vm.guest.sh("grep uio_pci_generic /proc/interrupts || echo 0: 0")
        return sum(int(word) for word in found.split()[1:] if word.isdigit())

    vm.guest.start("sh -c 'exec 3<>/dev/uio0; while :; do dd bs=4 count=1 <&3; done >/run/events'")
    time.sleep(1)
    before = count()
    raise_it()
    deadline = time.monotonic() + 10
    while count() == before:
        assert time.monotonic() < deadline, vm.guest.sh(f"lspci -vv -s {slot}")
        time.sleep(0.2)
    assert "INTx+" in vm.guest.sh(f"lspci -vv -s {slot} | grep Status:")
    assert "DisINTx+" in vm.guest.sh(f"lspci -vv -s {slot} | grep Control:")
    acknowledge()
    assert "INTx-" in vm.guest.sh(f"lspci -vv -s {slot} | grep Status:")


def dma(vm: Machine, peek, poke) -> None:  # type: ignore[no-untyped-def]
    """From guest memory to the card and back to another place; below 1 MiB nobody else writes."""
    source, destination, size = 0x20000, 0x30000, 256
    pattern = bytes(range(256))
    with open(vm.ram[0].path, "r+b") as ram:
        ram.seek(source)
        ram.write(pattern)
    for registers in (
        {0x80: source, 0x88: 0x40000, 0x90: size, 0x98: 1},
        {0x80: 0x40000, 0x88: destination, 0x90: size, 0x98: 3},
    ):
        for offset, value in registers.items():
            poke(offset, value, 64)
        deadline = time.monotonic() + 10
        while peek(0x98) & 1:
            assert time.monotonic() < deadline
    with open(vm.ram[0].path, "rb") as ram:
        ram.seek(destination)
        assert ram.read(size) == pattern
