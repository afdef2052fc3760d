# SPDX-License-Identifier: Apache-2.0
"""Tests of the lab: guests answer, modules load, and measurements on RAM files are correct."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.lab import NAMES, GuestError, LabError, Machine, build_module, kernel, userland
from tests.lab.guestkernels import in_root
from tests.lab.initramfs import GUEST
from tests.lab.sources import debian_mirror

pytestmark = pytest.mark.lab
MIB = 1 << 20
REPORTING = ["-device", "virtio-balloon-pci,free-page-reporting=on"]


@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.parametrize("name", NAMES)
def test_guest_answers_and_takes_a_module(name: str, machine: str, tmp_path: Path) -> None:
    built = build_module(name, GUEST / "hello", tmp_path)
    assert built.warnings == []
    files: dict[str, bytes | Path] = {"lab/lab_hello.ko": built.modules[0]}
    with Machine(kernel=name, machine=machine, memory=256, files=files) as vm:
        assert vm.guest.sh("uname -r") == kernel(name).version
        assert vm.guest.sh("insmod /lab/lab_hello.ko && dmesg").endswith("lab_hello: loaded")
        result = vm.guest.run("echo out; echo err >&2; cat; exit 7", stdin=b"\0\xff\n")
        assert (result.status, result.out, result.err) == (7, b"out\n\0\xff\n", b"err\n")


@pytest.mark.parametrize("name", NAMES)
def test_reporting_makes_holes_in_the_ram_file(name: str) -> None:
    """QEMU's own balloon releases what the guest frees, and the measured resident size shrinks."""
    with Machine(kernel=name, memory=512, extra=REPORTING) as vm:
        vm.guest.load("virtio_balloon")
        vm.guest.report_everything()
        vm.guest.start("memhog 300", log="/run/hog.log", fifo="/run/hog")
        vm.guest.wait_for("grep -q filled /run/hog.log")
        full = vm.resident()
        assert full > 300 * MIB
        vm.guest.sh("echo check >/run/hog; sleep 1; grep -q good /run/hog.log; echo free >/run/hog")
        wait_until(lambda: vm.resident() < full - 285 * MIB)
        assert sum(end - start for start, end in vm.ram[0].extents()) == vm.resident()


@pytest.mark.parametrize("name", NAMES)
def test_buddy_pages_are_the_free_memory(name: str) -> None:
    """Buddy pages match MemFree, also when fragmented, less the pages in per-CPU lists."""
    with Machine(kernel=name, memory=512) as vm:
        vm.guest.start("memhog 300", log="/run/hog.log", fifo="/run/hog")
        vm.guest.wait_for("grep -q filled /run/hog.log")
        for command, single in (("fragment", 20_000), ("free", 0)):
            vm.guest.sh(f"echo {command} >/run/hog")
            vm.guest.wait_for(f"tail -1 /run/hog.log | grep -q {command}")
            pages, free = vm.guest.pages(), vm.guest.meminfo()["MemFree"]
            assert 0.97 * free < int(pages.sum()) * 4096 <= 1.02 * free
            alone = pages[1:-1] & ~pages[:-2] & ~pages[2:]
            assert int(alone.sum()) >= single


def test_programs_notice_a_wrong_byte() -> None:
    """The checks inside the guest, on which other tests depend, detect a wrong byte."""
    with Machine(memory=256) as vm:
        vm.guest.sh("keeper make /tmp/kept 8 && keeper check /tmp/kept")
        vm.guest.sh(
            "f=$(ls -S /tmp/kept/* | head -1); printf x | dd of=$f bs=1 seek=99 conv=notrunc"
        )
        assert vm.guest.run("keeper check /tmp/kept").status == 1
        assert "0 bad" in vm.guest.sh("churn 50 1")


def test_two_nodes_and_private_memory() -> None:
    with Machine(memory=512, nodes=2, smp=2) as vm:
        assert vm.guest.sh("ls -d /sys/devices/system/node/node*").count("node/node") == 2
        assert [ram.size() for ram in vm.ram] == [256 * MIB] * 2
        before = [ram.resident() for ram in vm.ram]
        vm.guest.sh("memhog 300 </dev/null")
        assert all(ram.resident() > old + 50 * MIB for ram, old in zip(vm.ram, before, strict=True))
    with Machine(memory=256, backing="private") as vm:
        assert vm.guest.sh("echo up") == "up"


def test_a_pci_device_can_be_unplugged_and_plugged_again() -> None:
    for machine, bus in (("pc", {}), ("q35", {"bus": "rp0"})):
        with Machine(memory=256, machine=machine, binaries=["usr/bin/lspci"]) as vm:
            for turn in range(2):
                vm.qmp("device_add", driver="virtio-rng-pci", id=f"d{turn}", **bus)
                vm.guest.wait_for("lspci -n | grep -q 1af4:10", timeout=20)
                vm.qmp("device_del", id=f"d{turn}")
                vm.monitor.wait_event("DEVICE_DELETED", device=f"d{turn}")


def test_guest_reboots() -> None:
    with Machine(memory=256, reboot=True) as vm:
        first = vm.guest.boot_id
        vm.reboot()
        assert vm.guest.boot_id != first
        assert vm.guest.sh("echo again") == "again"


def test_script_out_of_time_and_dead_guest_are_errors() -> None:
    with Machine(memory=256) as vm:
        assert vm.guest.run("sleep 100", timeout=1).status == 124
        with pytest.raises(GuestError, match="status 3"):
            vm.guest.sh("exit 3")
        vm.process.kill()
        with pytest.raises(GuestError, match=r"QEMU ended|broke"):
            vm.guest.sh("true")


def test_no_qemu_outlives_its_test() -> None:
    """QEMU ends when the test process that started it is killed."""
    program = (
        "from tests.lab import Machine; vm = Machine(memory=256); vm.start();"
        "print(vm.pid, vm.folder, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        pid, folder = child.stdout.readline().split()
        child.kill()
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in state(pid))
    subprocess.run(["rm", "-r", folder], check=True)


def state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_our_python_runs_on_a_guest_kernel_with_soft_dirty_tracking() -> None:
    program = """
import ctypes, mmap, numpy, vballoon_spec
memory = mmap.mmap(-1, 4096)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
def dirty():
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // 4096 * 8)
        return int.from_bytes(file.read(8), "little") >> 55 & 1
memory[0] = 1
first = dirty()
open("/proc/self/clear_refs", "w").write("4")
second = dirty()
memory[0] = 2
print(first, second, dirty())
"""
    with userland.machine(memory=1024) as vm:
        vm.guest.put("/tmp/program.py", program.encode())
        assert vm.guest.sh("enter python /tmp/program.py", timeout=100) == "1 0 1"


def test_module_that_does_not_compile_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "Kbuild").write_text("obj-m := broken.o\n")
    (tmp_path / "broken.c").write_text("#include <linux/module.h>\nint f(void) { return x; }\n")
    with pytest.raises(LabError, match="undeclared"):
        build_module("6.12", tmp_path, tmp_path / "out")
    assert not build_module("6.12", tmp_path, tmp_path / "out", check=False).modules
    assert sorted(os.listdir(tmp_path)) == ["Kbuild", "broken.c", "out"]
    assert os.listdir(tmp_path / "out") == []


def test_builds_leave_no_mounts_behind() -> None:
    root = kernel("6.12").build_root
    status, text = in_root(root, ["sh", "-c", "test -c /dev/null && test -e /proc/self && echo in"])
    assert (status, text.strip()) == (0, "in")
    assert str(root) not in Path("/proc/self/mounts").read_text()


ONE_LINE = """# deb http://old.invalid/debian trixie main
deb [arch=amd64 signed-by=/k.gpg] http://vendor.invalid/debian nodistro main
deb-src http://src.invalid/debian trixie main
deb http://mirror.invalid/debian/ trixie main contrib # ours
"""
DEB822 = """Types: deb deb-src
Enabled: no
URIs: http://off.invalid/debian
Suites: trixie
Components: main

# security comes first here
Types: deb
URIs: http://mirror.invalid/debian-security
Suites: trixie-security
Components: main

Types: deb
URIs:
 http://mirror.invalid/debian/
Suites: trixie trixie-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""


@pytest.mark.parametrize(
    ("name", "text"), [("sources.list", ONE_LINE), ("sources.list.d/debian.sources", DEB822)]
)
def test_mirror_is_the_hosts_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.delenv("VBALLOON_LAB_MIRROR", raising=False)
    (tmp_path / "sources.list.d").mkdir()
    with pytest.raises(LabError, match="no Debian mirror"):
        debian_mirror(tmp_path)
    (tmp_path / name).write_text(text)
    assert debian_mirror(tmp_path) == "http://mirror.invalid/debian/"


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.2)
