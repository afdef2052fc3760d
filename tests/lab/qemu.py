# SPDX-License-Identifier: Apache-2.0
"""Which QEMU, and its command line for one guest.

A QEMU unpacked from packages runs without being installed: through its own root's dynamic loader,
with the root's libraries and firmware. It sees the host's files and sockets as any program does.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab import cache, provision
from tests.lab.cache import LabError, cache_dir, say

LIBRARIES = "usr/lib/x86_64-linux-gnu"


def program(name: str = "qemu-system-x86_64") -> list[str]:
    """Return the command of one of QEMU's programs (also ``qemu-img``, ``qemu-storage-daemon``)."""
    if provision.host_qemu() and shutil.which(name):
        return [str(shutil.which(name))]
    provision.setup(())
    root = cache_dir() / "qemu"
    binary = root / "usr/bin" / name
    if not binary.is_file():
        raise LabError(f"the lab's QEMU has no {name}")
    loader = [str(root / "lib64/ld-linux-x86-64.so.2"), "--library-path", str(root / LIBRARIES)]
    command = [*loader, "--argv0", name, str(binary)]
    if name.startswith("qemu-system"):
        for folder in ("qemu", "seabios"):
            command += ["-L", str(root / "usr/share" / folder)]
    return command


def environment() -> dict[str, str]:
    """Return the environment for :func:`program`: QEMU loads its modules from the same root."""
    if provision.host_qemu():
        return dict(os.environ)
    return {**os.environ, "QEMU_MODULE_DIR": str(cache_dir() / "qemu" / LIBRARIES / "qemu")}


def version() -> tuple[int, int, int]:
    """Return the version of the QEMU in use."""
    text = subprocess.run(
        [*program(), "--version"], capture_output=True, text=True, check=True, env=environment()
    ).stdout
    major, minor, micro = text.split()[3].split("(")[0].split(".")[:3]
    return int(major), int(minor), int(micro)


def accelerator() -> str:
    """``kvm`` if a guest really runs with it here, else ``tcg``; tried once per boot of the host.

    ``$VBALLOON_LAB_ACCEL`` overrules it.
    """
    named = os.environ.get("VBALLOON_LAB_ACCEL")
    if named:
        return named
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    note = cache_dir() / "accelerator"
    with cache.locked("accelerator"):
        known = note.read_text().split() if note.exists() else []
        if known[:1] != [boot] or len(known) != 2:
            known = [boot, "kvm" if _kvm_works() else "tcg"]
            note.write_text(" ".join(known))
            say(f"accelerator: {known[1]}")
    return known[1]


def _kvm_works() -> bool:
    """Whether a tiny boot sector run under KVM reaches its last instruction, a debug exit."""
    # mov al,16; out 0xf4,al -- isa-debug-exit ends QEMU with status 2 * 16 + 1
    sector = bytes([0xB0, 0x10, 0xE6, 0xF4, 0xF4]).ljust(510, b"\0") + b"\x55\xaa"
    with tempfile.NamedTemporaryFile(suffix=".img") as image:
        image.write(sector)
        image.flush()
        command = [
            *program(), "-nodefaults", "-display", "none", "-machine", "pc,accel=kvm", "-m", "16",
            "-drive", f"file={image.name},format=raw,if=ide", "-device", "isa-debug-exit",
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, timeout=20, check=False, env=environment()
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 33


#: Kernel parameters that spend an emulated guest's time on what a test wants, not on what hardware
#: may need.
APPEND = (
    "console=ttyS0 quiet loglevel=5 panic=-1 mitigations=off nowatchdog no_timer_check "
    "random.trust_cpu=on rcupdate.rcu_expedited=1 cryptomgr.notests tsc=reliable nokaslr"
)


@dataclass
class Config:
    """One guest's hardware.

    ``memory`` in MiB (with ``nodes=2``, half on each NUMA node). ``backing``: ``memfd`` (shared),
    ``file`` (shared, a file on tmpfs), ``private`` (memfd, not shared), ``hugetlb`` (shared memfd
    of 2 MiB pages; the host must have them). ``root_ports``: PCI Express ports ``rp0`` ... for
    devices to be hot-plugged on q35. ``ram_path``: the file for ``file`` (otherwise in a folder
    that goes with the machine). ``extra``: further QEMU arguments.
    """

    kernel: str = "6.12"
    machine: str = "q35"
    memory: int = 512
    smp: int = 1
    backing: str = "memfd"
    ram_path: Path | None = None
    nodes: int = 1
    root_ports: int = 1
    append: str = ""
    accel: str | None = None
    cpu: str | None = None
    reboot: bool = False
    extra: Sequence[str] = field(default_factory=tuple)


def arguments(config: Config, folder: Path, image: Path, initrd: Path, accel: str) -> list[str]:
    """QEMU's arguments for a guest whose sockets and logs live in ``folder``."""
    microvm = config.machine.startswith("microvm")  # it has none of these, and a serial port
    without = "isa-serial=off" if microvm else "usb=off,vmport=off,graphics=off"
    machine = f"{config.machine},accel={accel},{without}"
    if config.nodes == 1:
        machine += ",memory-backend=ram0"
    words = ["-nodefaults", "-no-user-config", "-display", "none", "-name", "lab"]
    words += ["-machine", machine, "-cpu", config.cpu or ("host" if accel == "kvm" else "max")]
    words += ["-m", f"{config.memory}M", "-smp", str(config.smp)]
    words += _memory(config, folder)
    words += [
        "-kernel",
        str(image),
        "-initrd",
        str(initrd),
        "-append",
        f"{APPEND} {config.append}".strip(),
    ]
    words += _channels(folder)
    if config.machine.startswith("q35"):
        for port in range(config.root_ports):
            words += [
                "-device",
                f"pcie-root-port,id=rp{port},bus=pcie.0,chassis={port + 1},slot={port + 1}",
            ]
    if not config.reboot:
        words.append("-no-reboot")
    return [*words, *config.extra]


def _channels(folder: Path) -> list[str]:
    return [
        "-chardev", f"file,id=console,path={folder}/console.log",
        "-device", "isa-serial,chardev=console,index=0",
        "-chardev", f"socket,id=agent,path={folder}/agent.sock,server=on,wait=off",
        "-device", "isa-serial,chardev=agent,index=1",
        *_monitor(folder, "qmp"),
        *_monitor(folder, "qmp2"),
    ]  # fmt: skip


def _monitor(folder: Path, name: str) -> list[str]:
    socket = f"socket,id={name},path={folder}/{name}.sock,server=on,wait=off"
    return ["-chardev", socket, "-mon", f"chardev={name},mode=control"]


def _memory(config: Config, folder: Path) -> list[str]:
    words: list[str] = []
    size = config.memory // config.nodes
    for node in range(config.nodes):
        words += ["-object", _backend(config, f"ram{node}", size, folder)]
        if config.nodes > 1:
            cpus = [f",cpus={cpu}" for cpu in range(config.smp) if cpu % config.nodes == node]
            words += ["-numa", f"node,nodeid={node},memdev=ram{node}{''.join(cpus)}"]
    return words


def _backend(config: Config, name: str, size: int, folder: Path) -> str:
    kinds = {
        "memfd": "memory-backend-memfd,share=on",
        "private": "memory-backend-memfd,share=off",
        "hugetlb": "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
        "file": f"memory-backend-file,share=on,mem-path={config.ram_path or folder / name}",
    }
    if config.backing not in kinds:
        raise LabError(f"no memory backing {config.backing!r}; there are {', '.join(kinds)}")
    return f"{kinds[config.backing]},id={name},size={size}M"


def is_x86() -> bool:
    """Whether this host can use the lab's amd64 packages."""
    return platform.machine() == "x86_64"
