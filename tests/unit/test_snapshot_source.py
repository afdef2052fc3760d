# SPDX-License-Identifier: Apache-2.0
"""``vballoon.snapshot.source``: where the descriptors of guest memory come from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest

from vballoon.control.client import ControlClient
from vballoon.errors import UsageError
from vballoon.snapshot.process import Process
from vballoon.snapshot.source import GuestSource

SIZE = 1 << 20


class Sandboxed:
    """A control client of a back-end that may not open the memory file again."""

    fds: list[int]

    def __init__(self, memory: Path) -> None:
        self.fds = []
        status = memory.stat()
        self.identity = {"device": status.st_dev, "inode": status.st_ino}

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        if command != "query-guest-memory":
            raise UsageError("the memory file cannot be opened read-only: Permission denied")
        region = {"guest-phys-addr": 0, "size": SIZE, "file": 0, "file-offset": 0}
        return {
            "files": [self.identity],
            "regions": [region | {"userspace-addr": 0}],
            "poison": None,
            "target": SIZE,
        }

    def execute_fd(self, command: str) -> tuple[Any, int]:
        raise UsageError("no layout")


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    path = tmp_path / "ram"
    path.write_bytes(b"\5" * SIZE)
    return path


def test_a_file_that_the_sandbox_forbids_comes_from_qemu(memory: Path) -> None:
    control = cast("ControlClient", Sandboxed(memory))
    with memory.open("r+b"), GuestSource.fetch(control, Process(os.getpid())) as source:
        (file,) = source.files
        assert os.pread(file.fd, 4, 0) == b"\5" * 4
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(file.fd, b"x", 0)


@pytest.mark.parametrize("process", [None, Process(os.getpid())])
def test_a_file_that_nobody_has_is_an_error(memory: Path, process: Process | None) -> None:
    control = cast("ControlClient", Sandboxed(memory))
    with pytest.raises(UsageError, match="read-only: Permission denied"):
        GuestSource.fetch(control, process)
