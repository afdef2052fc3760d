# SPDX-License-Identifier: Apache-2.0
"""Importing the package is cheap: a device program starts fast, a parent that forks stays small.

Counted in modules, because a busy machine has no stable times.
"""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"numpy", "construct", "json", "argparse", "pathlib", "ssl"}


def modules(statement: str) -> set[str]:
    """Return what is imported after *statement* in a new process."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_what_an_import_brings() -> None:
    base = modules("import asyncio")
    ours = modules("import vfio_user") - base
    assert not HEAVY & {name.split(".")[0] for name in ours}
    own = {
        name for name in ours if name.split(".")[0] in ("vfio_user", "fdsocket", "virtio_formats")
    }
    others = ours - own
    assert len(others) <= 12, sorted(others)
    assert len(own) <= 50, sorted(own)


def test_numpy_comes_with_its_first_use() -> None:
    state = """
import os, vfio_user
from virtio_formats.vfio_user import DmaMap
table = vfio_user.DmaTable()
fd = os.memfd_create("ram")
os.ftruncate(fd, 4096)
table.map(DmaMap(argsz=32, flags=3, offset=0, address=4096, size=4096), fd, limit=1)
assert "numpy" not in sys.modules
table.write(4096, b"data")
assert table.read(4096, 4) == b"data"
assert "construct" not in sys.modules
"""
    assert "numpy" in modules(state)


def test_construct_comes_with_the_first_layout_that_needs_it() -> None:
    flat = "from virtio_formats.vfio_user import Header\nHeader.parse(bytes(16)).build()"
    assert "construct" not in modules(flat)
    nested = "from virtio_formats.pci import Type0Header\nType0Header.parse(bytes(64)).build()"
    assert "construct" in modules(nested)
