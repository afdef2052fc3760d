# SPDX-License-Identifier: Apache-2.0
"""A guest that runs this Python, the project's sources, and the lab with a nested guest.

Some features of the host's kernel (soft-dirty tracking) may be missing on this machine, while a
Debian guest has them. Such a guest gets a disk with this Python, its packages, QEMU and a kernel.
Tests in it run the project on that kernel, with a nested guest.
"""

from __future__ import annotations

import compileall
import importlib.metadata
import py_compile
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.lab import cache, debs, initramfs, provision
from tests.lab.guestkernels import kernel
from tests.lab.machine import Machine
from tests.roots import REPOSITORY, SOURCE_ROOTS

INNER_KERNEL = "6.12"
#: Packages that are only needed for development are not copied.
LEFT_OUT = re.compile(
    r"(mypy|ruff|pip|hypothesis|setuptools|pkg_resources|ast_serialize|librt|_distutils|distutils|"
    r"__editable__|__pycache__|[0-9a-f]{20}__mypyc)"
)
NOT_STDLIB = ("site-packages", "test", "idlelib", "tkinter", "lib2to3", "__pycache__", "ensurepip")
ENTER = """#!/bin/sh
if [ ! -d /host/repo ]; then
    load virtio_blk && load ext4 && mkdir -p /host /run/host /run/work || exit 1
    until [ -b /dev/vda ]; do sleep 0.1; done
    mount -t ext4 -o ro /dev/vda /host || exit 1
    for folder in proc sys dev tmp run; do mount --rbind /$folder /host/$folder || exit 1; done
    mount --bind /repo /host/repo || exit 1
fi
exec chroot /host /usr/bin/env -i PATH=/python/bin:/usr/bin HOME=/tmp VBALLOON_LAB=/cache \\
    VBALLOON_LAB_ACCEL=tcg PYTHONPATH=/repo:{roots}:/packages PYTHONHOME=/python \\
    sh -c 'cd /repo && exec "$@"' sh "$@"
"""


def machine(**hardware: Any) -> Machine:
    """Return a machine whose guest has ``enter COMMAND...`` to run it with the project's sources.

    The sources are in ``/repo``, QEMU and kernel 6.12 in the cache of the lab inside the guest.
    *hardware* are arguments of :class:`~tests.lab.machine.Machine`; give it 2 GiB or more.
    """
    disk = f"file={image()},if=none,id=host,format=raw,readonly=on"
    drive = ["-drive", disk, "-device", "virtio-blk-pci,drive=host"]
    hardware["extra"] = [*drive, *hardware.get("extra", ())]
    hardware["files"] = {**dict(sources()), **hardware.get("files", {})}
    return Machine(**hardware)


def sources() -> Iterator[tuple[str, bytes | Path]]:
    """Return the project's files with their places in the guest."""
    roots = ":".join(f"/repo/{root.relative_to(REPOSITORY)}" for root in SOURCE_ROOTS)
    yield "lab/enter", ENTER.replace("{roots}", roots).encode()
    for folder in ("device", "spec", "tests", "driver_kmod", "examples"):
        for path in sorted((REPOSITORY / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"repo/{path.relative_to(REPOSITORY)}", path


def image() -> Path:
    """Return the disk, a cached ext4 image; rebuild it if Python, packages or the lab changed."""
    kernel(INNER_KERNEL)
    inner = initramfs.base(kernel(INNER_KERNEL))
    names = sorted(f"{each.name}-{each.version}" for each in importlib.metadata.distributions())
    recipe = [
        sys.version,
        names,
        Path(__file__).read_text(),
        (inner.parent / cache.STAMP).read_text(),
    ]
    return cache.build_locked("userland", recipe, "userland", _write_image) / "disk"


def _write_image(out: Path) -> None:
    cache.say("userland: collecting")
    tree = out / "tree"
    _python(tree)
    _inner_lab(tree / "cache")
    for folder in ("proc", "sys", "dev", "tmp", "run", "repo"):
        (tree / folder).mkdir(parents=True)
    make = shutil.which("mkfs.ext4", path=provision.PATH)
    if not make:
        raise cache.LabError("mkfs.ext4 is missing: apt-get install e2fsprogs")
    blocks = int(debs.run(["du", "-sk", str(tree)]).split()[0]) * 5 // 4 + 32768
    options = ["-q", "-F", "-O", "^has_journal", "-m", "0", "-d", str(tree)]
    debs.run([make, *options, str(out / "disk"), f"{blocks}k"])
    shutil.rmtree(tree)


def _python(tree: Path) -> None:
    """Copy this interpreter, its library and the packages, with all shared libraries they need."""
    library = Path(sysconfig.get_paths()["stdlib"])
    inside = tree / "python/lib" / library.name
    skip = shutil.ignore_patterns(*NOT_STDLIB)
    shutil.copytree(library, inside, ignore=skip, symlinks=False)
    packages = Path(sysconfig.get_paths()["purelib"])
    shutil.copytree(
        packages,
        tree / "packages",
        ignore=lambda _, names: [name for name in names if LEFT_OUT.match(name)],
    )
    (tree / "python/bin").mkdir(parents=True)
    program = tree / "python/bin/python"
    shutil.copy2(Path(sys.executable).resolve(), program)
    _libraries(tree, [program, *inside.rglob("*.so"), *(tree / "packages").rglob("*.so*")])
    _compile(inside, tree / "packages")
    (tree / "usr/bin").mkdir(parents=True)
    shutil.copy2(cache.cache_dir() / "tools/usr/bin/busybox", tree / "usr/bin/busybox")
    for applet in (
        "sh",
        "env",
        "ls",
        "cat",
        "mkdir",
        "rm",
        "sleep",
        "chmod",
        "cp",
        "dd",
        "kill",
        "ps",
    ):
        (tree / "usr/bin" / applet).symlink_to("busybox")
    (tree / "bin").symlink_to("usr/bin")


def _compile(*folders: Path) -> None:
    """Compile on the host: in an emulated guest the imports of NumPy alone take half a minute."""
    for folder in folders:
        compileall.compile_dir(
            folder,
            quiet=2,
            workers=0,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )


def _libraries(tree: Path, binaries: list[Path]) -> None:
    """Copy the host's libraries that the binaries load, at the paths where they load them."""
    _, text = debs.run_status(["ldd", *map(str, binaries)])
    for name in set(re.findall(r"(?:=>\s+|^\s+)(/\S+) \(", text, flags=re.MULTILINE)):
        if not name.startswith(str(tree)):
            target = tree / name.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, target)


def _inner_lab(inner: Path) -> None:
    """Copy the parts of the lab that boot one kernel, with their stamps, without build tools."""
    here = cache.cache_dir()
    image_file = kernel(INNER_KERNEL).image.relative_to(here)
    wanted = [image_file, Path("programs"), Path(f"initramfs-{INNER_KERNEL}")]
    wanted += [Path("qemu/usr/share") / each for each in ("qemu", "seabios")]
    wanted += [Path("qemu/usr/lib"), Path("qemu/usr/bin/qemu-system-x86_64"), Path("qemu/lib64")]
    wanted += [Path("qemu/usr/lib64"), Path("tools/usr/bin/busybox")]
    stamped = ("qemu", "tools", f"kernel-{INNER_KERNEL}", f"build-{INNER_KERNEL}")
    wanted += [Path(each) / cache.STAMP for each in stamped]
    for path in wanted:
        _copy(here / path, inner / path)
    (inner / f"kernel-{INNER_KERNEL}/usr/lib/modules/{kernel(INNER_KERNEL).version}").mkdir(
        parents=True
    )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink() or source.is_file():
        shutil.copy2(source, target, follow_symlinks=False)
    elif source.is_dir():
        shutil.copytree(source, target, symlinks=True)
