# SPDX-License-Identifier: Apache-2.0
"""The guest's root: an initramfs with busybox, the lab's own programs and one kernel's modules.

It is written here as a newc cpio archive, uncompressed, because unpacking a compressed one costs an
emulated guest more than reading a longer one. A kernel accepts several archives one after the
other, which is how a test adds files of its own.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.lab import cache, debs
from tests.lab.cache import LabError, cache_dir
from tests.lab.guestkernels import Kernel, in_root, kernel

GUEST = Path(__file__).parent / "guest"
PROGRAMS = ("agent", "memhog", "churn", "buddy", "keeper")
#: Modules that every guest carries (where its kernel has them as modules); none is loaded unasked.
MODULES = (
    "virtio_pci", "virtio_balloon", "virtio_rng", "virtio_console", "virtio_blk", "virtio_mem",
    "pvpanic_pci", "uio_pci_generic", "loop", "ext4",
)  # fmt: skip
FOLDERS = (
    "bin",
    "dev",
    "etc",
    "lab",
    "lib",
    "lib64",
    "modules",
    "proc",
    "run",
    "sbin",
    "sys",
    "tmp",
    "usr",
)


class Archive:
    """A newc cpio archive under construction: paths, once each, parents first."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._seen: set[str] = set()

    def has(self, path: str) -> bool:
        """Whether the path is in the archive already."""
        return path in self._seen

    def folder(self, path: str) -> None:
        """Add a folder and those above it."""
        above = path.rpartition("/")[0]
        if above:
            self.folder(above)
        if path not in self._seen:
            self._add(path, stat.S_IFDIR | 0o755, b"")

    def file(self, path: str, content: bytes, mode: int = 0o755) -> None:
        """Add a file, executable by default."""
        if path in self._seen:
            raise LabError(f"{path} is in the guest already")
        above = path.rpartition("/")[0]
        if above:
            self.folder(above)
        self._add(path, stat.S_IFREG | mode, content)

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link, unless the path is taken."""
        if path not in self._seen:
            self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def node(self, path: str, major: int, minor: int) -> None:
        """Add a character device."""
        self._add(path, stat.S_IFCHR | 0o600, b"", (major, minor))

    def _add(self, path: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        self._seen.add(path)
        self._parts.append(_entry(path, mode, content, len(self._seen), device))

    def bytes(self) -> bytes:
        """Return the archive, padded to a multiple of 512 bytes so that another one may follow."""
        whole = b"".join(self._parts) + _entry("TRAILER!!!", 0, b"", 0, (0, 0))
        return whole + bytes(-len(whole) % 512)


def _entry(path: str, mode: int, content: bytes, inode: int, device: tuple[int, int]) -> bytes:
    name = path.encode() + b"\0"
    numbers = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % number for number in numbers) + name
    head += bytes(-len(head) % 4)
    return head + content + bytes(-len(content) % 4)


def programs() -> Path:
    """Return the folder of the static guest programs; compile them if their sources changed."""
    sources = {name: (GUEST / f"{name}.c").read_text() for name in PROGRAMS}
    builder = kernel("6.12").build_root  # the one root that has a libc to link with
    return cache.build_locked("programs", sources, "programs", lambda path: _compile(path, builder))


def _compile(out: Path, root: Path) -> None:
    with tempfile.TemporaryDirectory(dir=root / "build") as work:
        for name in PROGRAMS:
            shutil.copy2(GUEST / f"{name}.c", work)
            inside = f"/build/{Path(work).name}/{name}"
            command = [
                "gcc",
                "-static",
                "-O2",
                "-D_GNU_SOURCE",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-o",
                inside,
                f"{inside}.c",
            ]
            status, log = in_root(root, command)
            if status:
                raise LabError(f"guest/{name}.c does not compile:\n{log}")
            shutil.copy2(Path(work) / name, out / name)


def busybox() -> bytes:
    """Return the static busybox of the lab's tools."""
    return (cache_dir() / "tools/usr/bin/busybox").read_bytes()


def base(guest_kernel: Kernel) -> Path:
    """Return the initramfs that all guests with this kernel share, a file in the cache."""
    compiled = programs()
    name = f"initramfs-{guest_kernel.name}"
    recipe = [
        guest_kernel.version,
        MODULES,
        (compiled / cache.STAMP).read_text(),
        Path(__file__).read_text(),
    ]
    folder = cache.build_locked(
        name, recipe, "programs", lambda path: _write_base(path, guest_kernel, compiled)
    )
    return folder / "initramfs"


def _write_base(out: Path, guest_kernel: Kernel, compiled: Path) -> None:
    archive = Archive()
    for folder in FOLDERS:
        archive.folder(folder)
    archive.node("dev/console", 5, 1)
    archive.file("init", (compiled / "agent").read_bytes())
    for name in PROGRAMS[1:]:
        archive.file(f"lab/{name}", (compiled / name).read_bytes())
    archive.file("lab/load", LOAD.encode())
    archive.file("bin/busybox", busybox())
    for applet in _applets():
        archive.link(f"bin/{applet}", "busybox")
    order = guest_kernel.with_dependencies(MODULES)
    for name in order:
        archive.file(f"modules/{name}.ko", guest_kernel.module(name), 0o644)
    lines = [f"{name} {' '.join(_with_bus(name, guest_kernel))}\n" for name in order]
    built_in = [name for name in MODULES if not guest_kernel.has_module(name)]
    lines += [f"{name} built-in\n" for name in built_in]
    archive.file("modules/order", "".join(lines).encode(), 0o644)
    (out / "initramfs").write_bytes(archive.bytes())


def _with_bus(name: str, guest_kernel: Kernel) -> list[str]:
    """Add the bus driver of a virtio driver, which no dependency names."""
    names = ["virtio_pci", name] if name.startswith("virtio_") else [name]
    return guest_kernel.with_dependencies(names)


#: ``load NAME [PARAMETER...]``: what modprobe does, from the order worked out on the host. A driver
#: that is built in is there already.
LOAD = """#!/bin/sh
name=$(echo "$1" | tr - _); shift
[ -d /sys/module/$name ] && exit 0
set -- "$@"
order=$(sed -n "s/^$name //p" /modules/order)
[ "$order" = built-in ] && exit 0
for module in ${order:-$name}; do
    [ -d /sys/module/$module ] && continue
    if [ ! -f /modules/$module.ko ]; then
        echo "load: this kernel has no $module" >&2; exit 1
    fi
    if [ $module = $name ]; then insmod /modules/$module.ko "$@" || exit 1
    else insmod /modules/$module.ko || exit 1; fi
done
"""


def _applets() -> list[str]:
    program = cache_dir() / "tools/usr/bin/busybox"
    done = subprocess.run([program, "--list"], capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split() if name != "busybox"]


LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = "lib64/ld-linux-x86-64.so.2"


def libraries(root: Path, binary: Path) -> list[Path]:
    """Return the shared libraries that a program of an unpacked root needs."""
    loader = [str(root / LOADER), "--library-path", str(root / LIBRARIES)]
    text = debs.run([*loader, "--list", str(binary)])
    return [Path(path) for path in re.findall(r"=> (\S+) \(", text)]


def add_binary(archive: Archive, path: str, root: Path | None = None) -> None:
    """Add a program with its libraries and loader, at the path it has below ``root``.

    ``root`` is an unpacked root, by default the lab's tools (``usr/bin/lspci``); ``Path("/")`` is
    the host.
    """
    root = root or cache_dir() / "tools"
    archive.file(path, (root / path).read_bytes())
    wanted = {f"{LIBRARIES}/{each.name}": each for each in libraries(root, root / path)}
    for inside, library in {**wanted, LOADER: root / LOADER}.items():
        if not archive.has(inside):
            archive.file(inside, library.read_bytes())


def overlay(files: Mapping[str, bytes | Path], binaries: Iterable[str] = ()) -> bytes:
    """Return an archive of more files for one guest, which follows the base.

    ``files`` maps a path in the guest to content or to a file of the host; ``binaries`` are
    programs of the lab's tools by path (``usr/bin/lspci``), which get their libraries with them.
    """
    archive = Archive()
    for path, content in files.items():
        archive.file(
            path.lstrip("/"), content.read_bytes() if isinstance(content, Path) else content
        )
    for path in binaries:
        add_binary(archive, path.lstrip("/"))
    return archive.bytes()
