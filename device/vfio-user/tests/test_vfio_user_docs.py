# SPDX-License-Identifier: Apache-2.0
"""``docs/vfio-user.md``: its device runs, and its table names tests that exist."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from unittest.mock import patch

import pytest

from vfio_user import PciDevice
from vfio_user.testing import LocalClient, events
from virtio_formats.vfio_user import PciIrq

HERE = Path(__file__).parent
PAGE = (HERE.parents[2] / "docs/vfio-user.md").read_text()


def test_every_test_that_the_table_names_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE)
    assert len(named) > 30
    for file, name in named:
        path = HERE / file
        if not path.exists():  # of the balloon's transport
            path = HERE.parents[2] / "tests/unit" / file
        tree = ast.parse(path.read_text())
        assert name in {getattr(node, "name", None) for node in tree.body}, f"{file}::{name}"


def test_every_test_class_of_vfio_user_is_in_the_table() -> None:
    named = set(re.findall(r"`test_\w+\.py::(Test\w+)`", PAGE))
    for file in HERE.glob("test_vfio_user_*.py"):
        tree = ast.parse(file.read_text())
        found = {n.name for n in tree.body if isinstance(n, ast.ClassDef)}
        classes = {name for name in found if name.startswith("Test")}
        # libvfio-user has no test like these.
        own = {"TestStream", "TestIntx", "TestDeclaration", "TestRegionWriteMulti"}
        own |= {"TestDeviceReset", "TestProgram", "TestWhyItEnded", "TestAfterwards"}
        own |= {"TestCorruption", "TestClientsOfOtherVersions", "TestExpansionRom"}
        own |= {"TestMsix", "TestResets", "TestPlaces"}
        own |= {
            "TestHooksThatWait",
            "TestStreaming",
            "TestFailures",
            "TestDeferredWork",
            "TestClientsThatDisconnect",
        }
        own |= {"TestMsix", "TestResets", "TestPlaces"}
        assert classes - named - own == set(), file.name


def test_the_programs_on_the_page_run_as_they_are_printed() -> None:
    programs = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(programs) == 2
    for text in programs:
        if "run_program" not in text:  # the other is a server: see below
            exec(compile(text, "docs/vfio-user.md", "exec"), {"__name__": "page"})


def test_the_device_on_the_page_works() -> None:
    text = next(b for b in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "Counter" in b)
    served: list[PciDevice] = []
    run = patch("vfio_user.run_program", lambda device: served.append(device) or 0)
    with run, pytest.raises(SystemExit, match="0"):
        exec(compile(text, "docs/vfio-user.md", "exec"), {"__name__": "page"})
    client = LocalClient(served[0])
    client.negotiate()
    assert [client.read(0, 0, 4)[0] for _ in range(3)] == [1, 2, 3]
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    client.assign(PciIrq.INTX, [fd])
    client.write(0, 0, b"\1")
    assert events(fd) == 1
    client.close()
    os.close(fd)
