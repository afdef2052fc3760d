# SPDX-License-Identifier: Apache-2.0
"""Unpack Debian packages into a folder.

The host's apt resolves, downloads and verifies them, and ``dpkg-deb`` unpacks them. Nothing is
installed and no maintainer script runs, so this takes seconds instead of minutes. apt uses a
separate state (lists, cache, an empty dpkg status), so that of the host does not change.
"""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.lab.cache import LabError, cache_dir, say
from tests.lab.sources import debian_mirror, keyring

ARCHITECTURE = "amd64"
MERGED = ("bin", "sbin", "lib", "lib64")  # since bookworm these are links into usr/


def run(command: list[str], **kwargs: object) -> str:
    """Return the standard output of a tool.  Raise LabError with its last lines if it fails."""
    done = subprocess.run(  # type: ignore[call-overload]
        command, text=True, capture_output=True, check=False, **kwargs
    )
    if done.returncode:
        words = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise LabError(f"{' '.join(command[:4])} ... failed ({done.returncode}):\n{words}")
    return str(done.stdout)


def run_bytes(command: list[str]) -> bytes:
    """Like :func:`run`, with the output as bytes."""
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(command[:4])} failed: {done.stderr.decode(errors='replace')}")
    return done.stdout


def run_status(command: list[str]) -> tuple[int, str]:
    """Return the exit status of a tool, and its output with its error output."""
    done = subprocess.run(
        command,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return done.returncode, done.stdout


@dataclass(frozen=True)
class Release:
    """A Debian release, used through a separate apt."""

    name: str
    suites: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Lists, archives and configuration of this apt."""
        return cache_dir() / "apt" / self.name

    def apt(self, *words: str, target: str | None = None) -> str:
        """Run ``apt-get`` or ``apt-cache`` (first word); *target* is the default suite."""
        option = ["-o", f"APT::Default-Release={target}"] if target else []
        environment = {**os.environ, "APT_CONFIG": str(self.folder / "apt.conf"), "LC_ALL": "C"}
        return run([words[0], *option, *words[1:]], env=environment)

    def update(self) -> None:
        """Write the configuration and fetch the package lists."""
        for part in ("lists/partial", "archives/partial", "nothing/partial", "etc/preferences.d"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        mirror, keys = debian_mirror(), keyring()
        lines = [f"deb [signed-by={keys}] {mirror} {suite} main\n" for suite in self.suites]
        (self.folder / "sources.list").write_text("".join(lines))
        (self.folder / "apt.conf").write_text(self._configuration())
        say(f"{self.name}: package lists")
        self.apt("apt-get", "-q", "update")

    def _configuration(self) -> str:
        here = self.folder
        settings = {
            "Dir::Etc": here / "etc",
            "Dir::Etc::sourcelist": here / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State": here,
            "Dir::State::status": here / "status",
            "Dir::Cache": here,
            "APT::Architecture": ARCHITECTURE,
            "APT::Architectures": ARCHITECTURE,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        return "".join(f'{name} "{value}";\n' for name, value in settings.items())

    def depends(self, package: str, target: str | None = None) -> list[str]:
        """Return the names of the direct dependencies of a package."""
        text = self.apt("apt-cache", "depends", "--important", package, target=target)
        return [
            line.split()[-1] for line in text.splitlines() if line.strip().startswith("Depends:")
        ]

    def closure(self, packages: list[str], target: str | None = None) -> list[str]:
        """Return the file names of the packages and of everything they depend on."""
        # apt lists only what it would download, so it must not see what it has downloaded already.
        empty = f"Dir::Cache::archives={self.folder / 'nothing'}"
        text = self.apt(
            "apt-get", "install", "-y", "-q", "-o", empty, "--print-uris", *packages, target=target
        )
        return [line.split()[1] for line in text.splitlines() if line.startswith("'")]

    def fetch_closure(self, packages: list[str], target: str | None = None) -> list[Path]:
        """Download packages with their dependencies, and return the paths of the files."""
        names = self.closure(packages, target)
        self.apt("apt-get", "install", "-y", "-q", "--download-only", *packages, target=target)
        return [self.folder / "archives" / name for name in names]

    def fetch(self, packages: list[str], target: str | None = None) -> list[Path]:
        """Download packages without their dependencies, and return the paths of the files."""
        text = self.apt("apt-get", "download", "-q", "--print-uris", *packages, target=target)
        names = [line.split()[1] for line in text.splitlines() if line.startswith("'")]
        environment = {**os.environ, "APT_CONFIG": str(self.folder / "apt.conf"), "LC_ALL": "C"}
        option = ["-o", f"APT::Default-Release={target}"] if target else []
        where = self.folder / "archives"
        run(["apt-get", *option, "download", "-q", *packages], env=environment, cwd=where)
        return [where / name for name in names]


def unpack(debs: list[Path], root: Path) -> None:
    """Unpack packages into ``root``, whose ``/bin``, ``/lib`` ... are links into ``/usr``."""
    for name in MERGED:
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda deb: _unpack_one(deb, root), debs))


def _unpack_one(deb: Path, root: Path) -> None:
    # Through tar, because dpkg-deb -x would replace the link /bin by a directory of an older
    # package.
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as reader:
        run(
            ["tar", "-x", "--keep-directory-symlink", "-C", str(root), "-f", "-"],
            stdin=reader.stdout,
        )
    if reader.returncode:
        raise LabError(f"{deb.name} could not be unpacked")
