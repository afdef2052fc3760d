# SPDX-License-Identifier: Apache-2.0
"""The distribution installs into an empty environment, without a compiler, and works there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ALLOWED = {"vfio-user", "virtio-formats", "numpy", "construct", "pip", "setuptools"}

DEVICE = """
import importlib.metadata
from vfio_user import ConfigSpace, PciDevice, Region
from vfio_user.testing import LocalClient, Ram

class Adder(PciDevice):
    def __init__(self):
        bar = Region(4096, read=lambda offset, count: bytes([7]) * count, write=self.copy)
        super().__init__(ConfigSpace(vendor_id=1, device_id=2), {0: bar}, {})
    def copy(self, offset, data):
        self.defer(lambda: self.dma.write(0x1000, self.dma.read(0x2000, 4)))

client = LocalClient(Adder())
client.negotiate()
client.map(ram := Ram(0x1000, 0x2000))
ram.write(0x2000, b"data")
client.write(0, 0, b"x")
assert ram.read(0x1000, 4) == b"data"
assert client.read(0, 0, 2) == b"\\7\\7"
print(*(found.metadata["Name"] for found in importlib.metadata.distributions()))
"""


@pytest.mark.full
@pytest.mark.skipif("FULL" not in os.environ, reason="FULL=1: needs a package index")
@pytest.mark.timeout(600)
def test_an_empty_environment(tmp_path: Path) -> None:
    """Needs an index for NumPy, construct and setuptools."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env/bin/python"
    nothing = {"CC": "/bin/false", "CXX": "/bin/false", "PYTHONNOUSERSITE": "1"}
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | nothing
    sources = []
    for name in ("spec/virtio-formats", "device/vfio-user"):  # pip builds where the sources are
        sources.append(tmp_path / Path(name).name)
        shutil.copytree(ROOT / name, sources[-1], ignore=shutil.ignore_patterns("*.egg-info"))
    subprocess.run([python, "-m", "pip", "install", "-q", *sources], env=environ, check=True)
    done = subprocess.run(
        [python, "-c", DEVICE], env=environ, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names = {name.lower().replace("_", "-") for name in done.stdout.split()}
    assert {"vfio-user", "virtio-formats"} <= names <= ALLOWED
    tool = tmp_path / "env/bin/vballoon"
    assert not tool.exists()
