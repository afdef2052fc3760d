# SPDX-License-Identifier: Apache-2.0
"""vballoon.keeper.sandbox: from inside, each forbidden thing is tried for real."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from vballoon.keeper import landlock
from vballoon.keeper.sandbox import EXIT_REFUSED, system_call_name

INSIDE = """
import asyncio, concurrent.futures.thread, ctypes, errno, fcntl, mmap, os, signal, socket, sys
import numpy as np
from vballoon.keeper.sandbox import Limits, Policy, SandboxMode, enter
from vballoon.native import guard
libc = ctypes.CDLL(None, use_errno=True)
outside = socket.socket(socket.AF_UNIX)
folder = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)
other = int(sys.argv[2])
guard.install()
enter(Policy("vm1", SandboxMode(sys.argv[3]), user=65534, group=65534, folders=(folder,)))
"""


def inside(text: str, folder: os.PathLike[str], other: int = 1, mode: str = "on"):
    script = INSIDE + textwrap.dedent(text)
    return subprocess.run(
        [sys.executable, "-c", script, os.fspath(folder), str(other), mode],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


REFUSED = {
    "connect": "outside.connect(b'/run/whatever.sock')",
    "execve": "os.execv('/bin/true', ['true'])",
    "ptrace": "libc.ptrace(16, other, 0, 0)",
    "process_vm_readv": "libc.process_vm_readv(other, None, 0, None, 0, 0)",
    "socket": "socket.socket(socket.AF_INET)",
    "bind": "outside.bind(b'/tmp/x')",
    "fork": "os.fork()",
    "kill": "os.kill(other, signal.SIGTERM)",
    "mmap": "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "setuid": "libc.syscall(105, 0)",
    "mount": "libc.mount(None, None, None, 0, None)",
    "fcntl": "fcntl.fcntl(outside, fcntl.F_SETOWN, other)",
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_forbidden_system_call_ends_the_process_with_one_line(what, tmp_path):
    os.chmod(tmp_path, 0o777)
    done = inside(f"{REFUSED[what]}\nprint('it ran')", tmp_path, os.getpid())
    assert "it ran" not in done.stdout
    assert done.returncode == EXIT_REFUSED, done.stderr
    (line,) = done.stderr.splitlines()
    start, number = line.rsplit(" ", 1)
    assert start == "vballoon: vm1: the sandbox refused system call"
    expected = {"fork": {"clone", "fork"}}.get(what, {what})
    assert system_call_name(int(number)) in expected


@pytest.mark.skipif(not landlock.abi_version(), reason="this kernel has no Landlock")
def test_files_outside_the_folders_stay_closed(tmp_path):
    os.chmod(tmp_path, 0o777)
    done = inside(
        """
        for path in ("/etc/passwd", f"/proc/{other}/mem", f"/proc/{other}/maps", "/tmp/new"):
            try:
                os.open(path, os.O_RDWR | os.O_CREAT if path == "/tmp/new" else os.O_RDONLY)
            except PermissionError:
                continue
            print("opened", path)
        export = os.open("export", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=folder)
        os.write(export, b"kept")
        """,
        tmp_path,
        os.getpid(),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "export").read_text() == "kept"


def test_what_serving_needs_still_works(tmp_path):
    os.chmod(tmp_path, 0o777)
    done = inside(
        """
        async def serve():
            here, there = socket.socketpair()
            loop = asyncio.get_running_loop()
            seen = loop.create_future()
            event = os.eventfd(0, os.EFD_NONBLOCK)
            loop.add_reader(event, lambda: seen.set_result(os.eventfd_read(event)))
            assert guard.signal(event) == 0
            assert await seen == 1
            assert await asyncio.to_thread(lambda: 7) == 7
            fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, 1 << 20)
            area = mmap.mmap(fd, 1 << 20)
            view = np.frombuffer(area, np.uint8)
            guard.watch(view)
            view[:] = 1
            assert libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(1 << 16)) == 0
            assert view[0] == 0
            os.ftruncate(fd, 0)
            assert view[5000] == 0
            assert guard.faults() == 1
            socket.send_fds(here, [b"x"], [fd])
            assert socket.recv_fds(there, 1, 1)[0] == b"x"
            os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        asyncio.run(serve())
        assert (os.getuid(), os.geteuid(), os.getgid()) == (65534,) * 3
        print("done")
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_the_log_mode_refuses_nothing(tmp_path):
    os.chmod(tmp_path, 0o777)
    done = inside("socket.socket(socket.AF_INET)\nprint('it ran')", tmp_path, mode="log")
    assert (done.returncode, done.stdout) == (0, "it ran\n"), done.stderr


def test_limits_hold(tmp_path):
    os.chmod(tmp_path, 0o777)
    done = inside(
        """
        import resource
        print(resource.getrlimit(resource.RLIMIT_NOFILE), resource.getrlimit(resource.RLIMIT_CORE))
        try:
            bytearray(3 << 30)
        except MemoryError:
            print("refused")
        """,
        tmp_path,
    )
    assert done.stdout == f"{(4096, 4096)} {(0, 0)}\nrefused\n", done.stderr
