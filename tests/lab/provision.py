# SPDX-License-Identifier: Apache-2.0
"""What the lab consists of, as recipes of package names, and ``setup`` that makes it all so.

Everything is unpacked below the cache folder; the host gets no packages but :func:`prerequisites`.
Kernel headers of different releases want different libraries and compilers, so each kernel has a
build root of its own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.lab import cache as store
from tests.lab import debs
from tests.lab.cache import LabError, say

BOOKWORM = debs.Release("bookworm", ("bookworm",))
TRIXIE = debs.Release("trixie", ("trixie", "trixie-backports"))
BACKPORTS = "trixie-backports"

#: Commands that the lab calls on the host, and the package that brings each.
PREREQUISITES = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
    "xz": "xz-utils",
    "zstd": "zstd",
    "unshare": "util-linux",
    "chroot": "coreutils",
    "mkfs.ext4": "e2fsprogs",
}
#: The same for the tests that need no virtual machine, and for the benchmarks.
TEST_TOOLS = {"spin": "spin", "cc": "build-essential", "strace": "strace"}
#: Some of these are where only root looks.
PATH = os.environ.get("PATH", "/usr/bin") + ":/usr/sbin:/sbin"
#: What a chroot needs before ``make`` and the compiler can run in it.
BUILD_TOOLS = ["bash", "coreutils", "dash", "findutils", "gcc", "grep", "make", "mawk", "sed"]


@dataclass(frozen=True)
class KernelRecipe:
    """A guest kernel by release and suite, and what its build root gets besides the headers."""

    name: str
    release: debs.Release
    target: str | None = None
    extra: tuple[str, ...] = ()


KERNELS = (
    KernelRecipe("6.1", BOOKWORM, extra=("perl",)),
    # The guest programs are compiled here, and the module's checkers run here.
    KernelRecipe("6.12", TRIXIE, extra=("libc6-dev", "sparse", "perl")),
    KernelRecipe("backports", TRIXIE, BACKPORTS, extra=("sparse",)),
)
QEMU_PACKAGES = ["qemu-system-x86", "qemu-utils"]
TOOL_PACKAGES = ["busybox-static", "pciutils"]


def prerequisites(more: Mapping[str, str] | None = None) -> list[str]:
    """Debian packages that the host lacks and the lab calls; empty when nothing is missing.

    ``more`` adds what a caller needs itself: the package by the command that it brings.
    """
    wanted = {**PREREQUISITES, **(more or {})}
    missing = {package for tool, package in wanted.items() if not shutil.which(tool, path=PATH)}
    if not Path("/usr/share/keyrings/debian-archive-keyring.gpg").is_file():
        missing.add("debian-archive-keyring")
    return sorted(missing)


def install_prerequisites(more: Mapping[str, str] | None = None) -> None:
    """Install what is missing, as root; otherwise say what somebody has to install."""
    missing = prerequisites(more)
    if not missing:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise LabError(f"as root, please: {' '.join(command)}")
    say(f"installing {' '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    debs.run(["apt-get", "-q", "update"], env=environment)
    debs.run(command, env=environment)


def setup(names: tuple[str, ...] = ("6.1", "6.12", "backports")) -> None:
    """Make the lab ready: QEMU, tools, the named kernels and their build roots, the guest programs.

    Returns at once where everything is there. May be interrupted and repeated at will.
    Raises :class:`LabError` with what to do when something cannot be had.
    """
    if is_ready(names):
        return
    install_prerequisites()
    with store.locked():
        _setup_locked([recipe for recipe in KERNELS if recipe.name in names])


def is_ready(names: tuple[str, ...]) -> bool:
    """Whether a :func:`setup` of these kernels has nothing to do."""
    wanted = [recipe for recipe in KERNELS if recipe.name in names]
    return all(store.is_built(name, recipe) for name, recipe in _everything(wanted))


def _everything(wanted: list[KernelRecipe]) -> list[tuple[str, object]]:
    folders: list[tuple[str, object]] = [("tools", TOOL_PACKAGES)]
    if not host_qemu():
        folders.append(("qemu", QEMU_PACKAGES))
    for recipe in wanted:
        folders += [
            (f"kernel-{recipe.name}", _kernel_stamp(recipe)),
            (f"build-{recipe.name}", _build_stamp(recipe)),
        ]
    return folders


def _kernel_stamp(recipe: KernelRecipe) -> object:
    return [recipe.release.name, recipe.target]


def _build_stamp(recipe: KernelRecipe) -> object:
    return [recipe.release.name, recipe.target, BUILD_TOOLS, list(recipe.extra)]


def _setup_locked(wanted: list[KernelRecipe]) -> None:
    updated: set[str] = set()

    def lists(release: debs.Release) -> None:
        if release.name not in updated:
            release.update()
            updated.add(release.name)

    def make(name: str, stamp: object, release: debs.Release, fill: object) -> None:
        if not store.is_built(name, stamp):
            lists(release)
            store.build(name, stamp, fill)  # type: ignore[arg-type]

    make("tools", TOOL_PACKAGES, TRIXIE, lambda path: _fill(path, TRIXIE, TOOL_PACKAGES))
    if not host_qemu():
        make(
            "qemu",
            QEMU_PACKAGES,
            TRIXIE,
            lambda path: _fill(path, TRIXIE, QEMU_PACKAGES, BACKPORTS),
        )
    for recipe in sorted(wanted, key=lambda each: each.name != "6.12"):
        make(
            f"kernel-{recipe.name}",
            _kernel_stamp(recipe),
            recipe.release,
            lambda path, recipe=recipe: _fill_kernel(path, recipe),
        )
        make(
            f"build-{recipe.name}",
            _build_stamp(recipe),
            recipe.release,
            lambda path, recipe=recipe: _fill_build(path, recipe),
        )
    for release in (BOOKWORM, TRIXIE):
        shutil.rmtree(release.folder / "archives", ignore_errors=True)


def _fill(
    path: Path, release: debs.Release, packages: list[str], target: str | None = None
) -> None:
    say(f"{path.name.split('.part-')[0]}: fetching {' '.join(packages)}")
    debs.unpack(release.fetch_closure(packages, target), path)


def image_package(recipe: KernelRecipe) -> str:
    """Return the package of the newest cloud kernel of the recipe's suite, named by its version."""
    for name in recipe.release.depends("linux-image-cloud-amd64", recipe.target):
        if name.startswith("linux-image-"):
            return name
    raise LabError(f"no cloud kernel found for {recipe.name}")


def _fill_kernel(path: Path, recipe: KernelRecipe) -> None:
    image = image_package(recipe)
    say(f"kernel-{recipe.name}: fetching {image}")
    # Newer suites split the image: the kernel in one package, its modules in another.
    parts = [
        name
        for name in recipe.release.depends(image, recipe.target)
        if name.startswith(("linux-binary-", "linux-modules-"))
    ]
    debs.unpack(recipe.release.fetch(parts or [image], recipe.target), path)


def _fill_build(path: Path, recipe: KernelRecipe) -> None:
    version = kernel_version(store.cache_dir() / f"kernel-{recipe.name}")
    packages = [f"linux-headers-{version}", *BUILD_TOOLS, *recipe.extra]
    _fill(path, recipe.release, packages, recipe.target)
    for tool, real in (
        ("awk", "mawk"),
        ("cc", "gcc"),
    ):  # what the packages' scripts would have linked
        if not (path / "usr/bin" / tool).exists():
            (path / "usr/bin" / tool).symlink_to(real)
    for folder in ("dev", "proc", "tmp", "build"):
        (path / folder).mkdir(exist_ok=True)


def as_root() -> list[str]:
    """Options of ``unshare`` that make an ordinary user root of a namespace; none for root."""
    return [] if os.geteuid() == 0 else ["--map-root-user"]


def kernel_version(folder: Path) -> str:
    """Return the version (``uname -r``) of the one kernel unpacked in ``folder``."""
    found = [path.name for path in (folder / "usr/lib/modules").iterdir()]
    if len(found) != 1:
        raise LabError(f"{folder} holds {len(found)} kernels, not one")
    return found[0]


@cache
def host_qemu() -> Path | None:
    """Return the host's own QEMU if it is at least 10.2 and has both devices that are used here."""
    found = shutil.which("qemu-system-x86_64")
    if not found:
        return None
    words = debs.run_status([found, "--version"])[1].split()
    devices = debs.run_status([found, "-device", "help"])[1]
    try:
        version = tuple(int(part) for part in words[3].split(".")[:2])
    except (IndexError, ValueError):
        return None
    wanted = ('"vhost-user-test-device-pci"', '"vfio-user-pci"')
    return Path(found) if version >= (10, 2) and all(name in devices for name in wanted) else None
