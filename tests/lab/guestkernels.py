# SPDX-License-Identifier: Apache-2.0
"""The guest kernels: where each one's image, modules and headers are, and building modules for it.

Debian's packages are unpacked, not installed, so there is no ``modules.dep``; dependencies are read
from the modules themselves (``.modinfo``).
"""

from __future__ import annotations

import lzma
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from tests.lab import debs, provision
from tests.lab.cache import LabError, cache_dir

NAMES = tuple(recipe.name for recipe in provision.KERNELS)


@dataclass(frozen=True)
class Built:
    """What a module build gave: the ``.ko`` files and everything that was printed."""

    modules: tuple[Path, ...]
    log: str

    @property
    def warnings(self) -> list[str]:
        """The lines of the log in which the compiler or a checker complains."""
        return [line for line in self.log.splitlines() if re.search(r"\b(warning|error):", line)]


@dataclass(frozen=True)
class Kernel:
    """One guest kernel: ``name`` is ours (``6.1``, ``6.12``, ``backports``), ``version`` is ``uname
    -r``.
    """

    name: str
    version: str
    folder: Path
    build_root: Path

    @property
    def image(self) -> Path:
        """The bootable image."""
        for path in (self._modules / "vmlinuz", self.folder / f"boot/vmlinuz-{self.version}"):
            if path.is_file():
                return path
        raise LabError(f"no kernel image in {self.folder}")

    @property
    def _modules(self) -> Path:
        return self.folder / "usr/lib/modules" / self.version

    @cached_property
    def _index(self) -> dict[str, Path]:
        files = self._modules.rglob("*.ko*")
        return {_plain(path.name.split(".ko")[0]): path for path in files}

    def has_module(self, name: str) -> bool:
        """Whether ``name`` is a loadable module of this kernel (a built-in driver is not)."""
        return _plain(name) in self._index

    def module(self, name: str) -> bytes:
        """Return the uncompressed ``.ko`` of a module."""
        path = self._index.get(_plain(name))
        if path is None:
            raise LabError(f"kernel {self.version} has no module {name}")
        if path.suffix == ".xz":
            return lzma.decompress(path.read_bytes())
        if path.suffix == ".zst":
            return debs.run_bytes(["zstd", "-dc", str(path)])
        return path.read_bytes()

    def with_dependencies(self, names: Sequence[str]) -> list[str]:
        """Return the modules and all their dependencies, in an order in which ``insmod`` succeeds.

        Names that this kernel has no module for (built-in drivers) are left out.
        """
        order: list[str] = []

        def add(name: str) -> None:
            if name in order or not self.has_module(name):
                return
            for other in depends(self.module(name)):
                add(_plain(other))
            order.append(name)

        for name in names:
            add(_plain(name))
        return order

    def build_module(
        self, source: Path, out: Path, *, make: Sequence[str] = (), check: bool = True
    ) -> Built:
        """Build the out-of-tree module in ``source`` with this kernel's headers and its release's
        gcc.

        ``source`` (a folder with a Kbuild file or Makefile) is copied, so nothing is written to it;
        the ``.ko`` files are copied to ``out``. ``make`` adds words to the command line (``W=1``,
        ``C=2``, variables). Raises :class:`LabError` with the compiler's words, unless ``check`` is
        false: then a failed build is a :class:`Built` without modules.
        """
        with self._workspace(source) as work:
            inside = f"/build/{work.name}"
            headers = f"/usr/src/linux-headers-{self.version}"
            command = ["make", "-C", headers, f"M={inside}", *make, "modules"]
            status, log = in_root(self.build_root, command)
            if status and check:
                raise LabError(f"{source.name} does not build for {self.version}:\n{log[-6000:]}")
            out.mkdir(parents=True, exist_ok=True)
            found = sorted(work.rglob("*.ko")) if not status else []
            return Built(tuple(Path(shutil.copy2(path, out)) for path in found), log)

    def run_in_root(self, source: Path, command: Sequence[str]) -> tuple[int, str]:
        """Run a command in a copy of ``source`` inside the build root; exit status and output."""
        with self._workspace(source) as work:
            return in_root(self.build_root, command, f"/build/{work.name}")

    @contextmanager
    def _workspace(self, source: Path) -> Iterator[Path]:
        if not source.is_dir():
            raise LabError(f"{source} is not a folder")
        holder = self.build_root / "build"
        work = Path(tempfile.mkdtemp(prefix=f"{source.resolve().name}-", dir=holder))
        work.chmod(0o755)
        try:
            shutil.copytree(source, work, symlinks=False, dirs_exist_ok=True)
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def in_root(root: Path, command: Sequence[str], folder: str = "/") -> tuple[int, str]:
    """Run a command inside an unpacked root, with the host's ``/dev`` and a ``/proc``.

    The mounts live in a mount namespace of the command's own, so nothing has to be undone.
    """
    script = (
        'mount --rbind /dev "$0/dev" && mount --rbind /proc "$0/proc" && '
        'exec chroot "$0" /usr/bin/env -i PATH=/usr/bin:/usr/sbin LC_ALL=C HOME=/tmp '
        'sh -c \'cd "$0" && exec "$@"\' "$@"'
    )
    words = ["unshare", "--mount", *provision.as_root(), "sh", "-c", script, str(root), folder]
    return debs.run_status([*words, *command])


def _plain(name: str) -> str:
    return name.replace("-", "_")


def depends(module: bytes) -> list[str]:
    """Return the modules that a ``.ko`` names as dependencies."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    names = found.group(1).decode() if found else ""
    return [name for name in names.split(",") if name]


@cache
def kernel(name: str) -> Kernel:
    """Return the kernel ``6.1``, ``6.12`` or ``backports``; fetch it if it is not in the cache."""
    if name not in NAMES:
        raise LabError(f"no kernel {name!r}; the lab has {', '.join(NAMES)}")
    provision.setup((name,))
    folder = cache_dir() / f"kernel-{name}"
    return Kernel(name, provision.kernel_version(folder), folder, cache_dir() / f"build-{name}")


def kernels() -> list[Kernel]:
    """All guest kernels, oldest first."""
    provision.setup()
    return [kernel(name) for name in NAMES]


def build_module(name: str, source: Path, out: Path, **options: object) -> Built:
    """:meth:`Kernel.build_module` of the kernel called ``name``."""
    return kernel(name).build_module(source, out, **options)  # type: ignore[arg-type]
