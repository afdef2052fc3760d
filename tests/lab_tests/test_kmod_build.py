# SPDX-License-Identifier: Apache-2.0
"""The guest module builds on all kernels; compiler, sparse and checkpatch have nothing to say."""

from __future__ import annotations

import base64
import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.lab import NAMES, build_module, kernel
from tests.lab import cache as store
from tests.lab.provision import TRIXIE

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]
DRIVER = Path(__file__).resolve().parents[2] / "driver_kmod"
SPARSE = ["W=1", "C=2", "CF=-D__CHECK_ENDIAN__"]
CHECKPATCH_PACKAGES = ["linux-source-6.12", "diffutils"]
CHECKPATCH_FILES = ("checkpatch.pl", "spelling.txt", "const_structs.checkpatch")


def complaints(log: str) -> list[str]:
    return [line for line in log.splitlines() if re.search(r"\b(warning|error)\b", line, re.I)]


@pytest.fixture
def planted(tmp_path: Path) -> Callable[[str, str, str], Path]:
    """Return a copy of the module with one planted fault."""

    def plant(name: str, text: str, fault: str) -> Path:
        copy = shutil.copytree(DRIVER, tmp_path / "planted")
        source = (copy / name).read_text()
        assert text in source
        (copy / name).write_text(source.replace(text, fault, 1))
        return copy

    return plant


@pytest.mark.parametrize("name", NAMES)
def test_builds_without_a_warning(name: str, tmp_path: Path) -> None:
    built = build_module(name, DRIVER, tmp_path, make=["W=1"])
    assert complaints(built.log) == []
    (module,) = built.modules
    assert module.name == "vballoon_walk.ko"
    binary = module.read_bytes()
    for symbol in (b"walk_free_mem_block", b"walk_free_mem_block_paced"):
        assert b"__ksymtab_" + symbol + b"\0" in binary
    assert b"license=GPL\0" in binary
    assert b"alias=virtio:d00000005v*\0" in binary


def test_a_warning_would_be_seen(planted: Callable[..., Path], tmp_path: Path) -> None:
    source = planted("stats.c", "unsigned int n = 0;", "unsigned int n = 0, never_used;")
    built = build_module("6.12", source, tmp_path, make=["W=1"], check=False)
    assert any("never_used" in line for line in complaints(built.log))


def test_sparse_is_content(tmp_path: Path) -> None:
    log = build_module("6.12", DRIVER, tmp_path, make=SPARSE).log
    assert log.count("  CHECK  ") == len(list(DRIVER.glob("*.c")))
    assert complaints(log) == []


def test_sparse_sees_a_wrong_byte_order(planted: Callable[..., Path], tmp_path: Path) -> None:
    source = planted("push.c", "header->type = cpu_to_le16(type)", "header->type = type")
    log = build_module("6.12", source, tmp_path, make=SPARSE).log
    assert any("incorrect type in assignment" in line for line in complaints(log))


def _fill_checkpatch(folder: Path) -> None:
    """Provide the script from the kernel's source, and the ``diff`` that it calls."""
    (TRIXIE.folder / "archives").mkdir(parents=True, exist_ok=True)
    source, diffutils = (TRIXIE.fetch([name])[0] for name in CHECKPATCH_PACKAGES)
    wanted = " ".join(f"'*/scripts/{name}'" for name in CHECKPATCH_FILES)
    script = (
        'set -e; dpkg-deb --fsys-tarfile "$0" | tar -xO --wildcards "*/linux-source-*.tar.xz" | '
        f'tar -xJ -C "$2" --strip-components=2 --wildcards {wanted}; '
        'dpkg-deb --fsys-tarfile "$1" | tar -x -C "$2" --strip-components=3 ./usr/bin/diff'
    )
    subprocess.run(["bash", "-o", "pipefail", "-c", script, source, diffutils, folder], check=True)
    source.unlink()


@pytest.fixture(scope="module")
def checkpatch() -> Path:
    """Return the script from Debian's kernel source, kept in the lab's cache."""
    kernel("6.12")  # package lists, and perl in its build root
    with store.locked():
        return store.build("checkpatch", CHECKPATCH_PACKAGES, _fill_checkpatch)


def run_checkpatch(checkpatch: Path, source: Path, tmp_path: Path) -> str:
    both = shutil.copytree(source, tmp_path / "both")
    for name in (*CHECKPATCH_FILES, "diff"):
        shutil.copy(checkpatch / name, both)
    files = [p.name for p in sorted(source.iterdir()) if p.suffix in (".c", ".h")]
    files += ["Kbuild", "Makefile", "Kconfig"]
    command = "PATH=$PWD:$PATH perl checkpatch.pl --no-tree --strict --terse --no-summary -f"
    return kernel("6.12").run_in_root(both, ["sh", "-c", f"{command} {' '.join(files)}"])[1]


def test_checkpatch_is_content(checkpatch: Path, tmp_path: Path) -> None:
    assert run_checkpatch(checkpatch, DRIVER, tmp_path) == ""


def test_checkpatch_does_look(
    checkpatch: Path, planted: Callable[..., Path], tmp_path: Path
) -> None:
    source = planted("stats.c", "unsigned int n = 0;", "unsigned int n=0;")
    assert "spaces required around that '='" in run_checkpatch(checkpatch, source, tmp_path)


class Range(ctypes.Structure):
    _fields_ = (("pfn", ctypes.c_uint64), ("num", ctypes.c_uint64))


@pytest.fixture(scope="module")
def join(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., int]:
    """``vbw_range_join()`` of ``ranges.c``, compiled for userspace."""
    script = "gcc -Wall -Wextra -Werror -O2 -shared -fPIC -nostdlib -o r.so ranges.c && base64 r.so"
    status, text = kernel("6.12").run_in_root(DRIVER, ["sh", "-c", script])
    assert status == 0, text
    path = tmp_path_factory.mktemp("ranges") / "ranges.so"
    path.write_bytes(base64.b64decode(text))
    function: Callable[..., int] = ctypes.CDLL(str(path)).vbw_range_join
    function.argtypes = [ctypes.POINTER(Range), ctypes.c_uint64, ctypes.c_uint64]  # type: ignore[attr-defined]
    return function


@given(
    blocks=st.lists(
        st.integers(0, 6).flatmap(lambda o: st.tuples(st.integers(0, 200 >> o), st.just(o))),
        max_size=60,
    )
)
def test_joined_ranges_hold_exactly_the_pages(
    join: Callable[..., int], blocks: list[tuple[int, int]]
) -> None:
    reported = [(number << order, 1 << order) for number, order in blocks]
    pending, out = Range(0, 0), []
    for pfn, num in reported:
        if not join(pending, pfn, num):
            out.append((pending.pfn, pending.num))
            pending = Range(pfn, num)
    if pending.num:
        out.append((pending.pfn, pending.num))

    def pages(ranges: list[tuple[int, int]]) -> list[int]:
        return sorted(page for pfn, num in ranges for page in range(pfn, pfn + num))

    assert pages(out) == pages(reported)
    for (pfn, num), (after, more) in itertools.pairwise(out):
        assert pfn + num != after or (after, more) not in reported
