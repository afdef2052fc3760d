# SPDX-License-Identifier: Apache-2.0
"""The host's end of the script channel: shell text into the guest, exit status and output out of
it.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tests.lab.cache import LabError

GRACE = 15.0  # seconds that the channel gets beyond the time limit that the guest itself enforces
CHUNK = 32 * 1024
KPF_BUDDY = 10  # include/uapi/linux/kernel-page-flags.h


class GuestError(LabError):
    """A script in the guest failed, or the guest no longer answers."""


@dataclass(frozen=True)
class Result:
    """What a script did: status (124: out of time, 128 + n: signal n), output, error output."""

    status: int
    out: bytes
    err: bytes

    @property
    def text(self) -> str:
        """The output as text, without the white space at its end."""
        return self.out.decode(errors="replace").rstrip()


class Guest:
    """A running guest, seen through its agent. One script at a time."""

    def __init__(self, path: Path, alive: Callable[[], str | None]) -> None:
        """Use the channel's socket at ``path``; ``alive`` says why the machine is gone, or None."""
        self._alive = alive
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._buffer = bytearray()
        self._count = 0
        self.boot_id = ""

    def close(self) -> None:
        """Let go of the channel."""
        self._socket.close()

    def wait_until_up(self, timeout: float = 120) -> str:
        """Wait for the agent's greeting of a boot that was not seen yet; the boot's id."""
        deadline = time.monotonic() + timeout
        while True:
            words = self._line(deadline).split()
            if len(words) == 2 and words[0] == "H" and words[1] != self.boot_id:
                self.boot_id = words[1]
                return self.boot_id

    def run(self, script: str, *, timeout: float = 60, stdin: bytes = b"") -> Result:
        """Run shell text in the guest and wait for it, at most ``timeout`` seconds of guest time.

        Never raises for what the script does (see :class:`Result`); raises :class:`GuestError` when
        the guest does not answer any more. A process left in the background must let go of the
        output (``>/dev/null 2>&1 &``) or what it prints later is lost.
        """
        self.post(script, timeout=timeout, stdin=stdin)
        return self._collect(self._count, time.monotonic() + timeout + GRACE)

    def post(self, script: str, *, timeout: float = 60, stdin: bytes = b"") -> None:
        """Run shell text from which no answer can be expected, such as a reboot."""
        self._count += 1
        self._send("S", script.encode() + b"\n")
        self._send("I", stdin)
        self._socket.sendall(b"R %d %d\n" % (self._count, max(1, round(timeout))))

    def sh(self, script: str, *, timeout: float = 60, stdin: bytes = b"") -> str:
        """Like :meth:`run`, giving the output as text; raises :class:`GuestError` unless the status
        is 0.
        """
        result = self.run(script, timeout=timeout, stdin=stdin)
        if result.status:
            err = result.err.decode(errors="replace").strip()
            raise GuestError(
                f"{script!r} in the guest: status {result.status}\n{result.text}\n{err}"
            )
        return result.text

    def put(self, path: str, content: bytes, mode: int = 0o755, timeout: float = 120) -> None:
        """Write a file in the guest."""
        self.sh(f"cat >'{path}' && chmod {mode:o} '{path}'", stdin=content, timeout=timeout)

    def get(self, path: str, timeout: float = 120) -> bytes:
        """Read a file of the guest."""
        result = self.run(f"cat '{path}'", timeout=timeout)
        if result.status:
            raise GuestError(f"{path}: {result.err.decode(errors='replace').strip()}")
        return result.out

    def load(self, module: str, *parameters: str) -> None:
        """Load a driver with what it depends on; a built-in one is there already."""
        self.sh(" ".join(["load", module, *parameters]))

    def report_everything(self) -> None:
        """Have free page reporting report all that is freed, not only the largest blocks.

        Blocks of every order, and per-CPU lists that are as short as they can be: newer kernels
        keep tens of MiB of a large exit there, and while the guest is busy nothing drains them.
        Call it when the balloon driver is loaded: 6.1 sets the order when a device registers.
        """
        self.sh("echo 0 >/sys/module/page_reporting/parameters/page_reporting_order")
        self.sh("echo 100000 >/proc/sys/vm/percpu_pagelist_high_fraction")

    def start(self, command: str, log: str = "/dev/null", fifo: str = "") -> int:
        """Start a command in the background; its process id.

        ``log`` gets its output, ``fifo`` (made here, kept open) feeds its input:
        ``guest.sh("echo check >/run/hog")`` then talks to it.
        """
        feed = f"mkfifo {fifo}; exec 9<>{fifo}; " if fifo else ""
        source = "<&9" if fifo else "</dev/null"
        return int(self.sh(f"{feed}{command} {source} >{log} 2>&1 & echo $!"))

    def wait_for(self, condition: str, timeout: float = 60, every: float = 0.2) -> None:
        """Wait until a shell condition holds in the guest; else :class:`GuestError`."""
        script = f"until {condition}; do sleep {every}; done"
        result = self.run(script, timeout=timeout)
        if result.status:
            err = result.err.decode(errors="replace").strip()
            raise GuestError(
                f"{condition!r} did not come true in {timeout} s (status {result.status}) {err}"
            )

    def meminfo(self) -> dict[str, int]:
        """``/proc/meminfo``, in bytes (counts of huge pages as they are)."""
        pairs = (line.split(":") for line in self.sh("cat /proc/meminfo").splitlines())
        return {
            name: int(rest.split()[0]) * (1024 if rest.endswith("kB") else 1)
            for name, rest in pairs
        }

    def pages(self, flag: int = KPF_BUDDY) -> NDArray[np.bool_]:
        """Which page frames have a flag of ``/proc/kpageflags``; by default: are in buddy lists.

        One element for each frame from 0 up, frames that do not exist included.
        """
        result = self.run(f"buddy {flag}")
        if result.status:
            raise GuestError(f"buddy: {result.err.decode(errors='replace')}")
        packed = np.frombuffer(result.out, dtype=np.uint8)
        return np.unpackbits(packed, bitorder="little").astype(np.bool_)

    def _send(self, kind: str, content: bytes) -> None:
        for at in range(0, len(content), CHUNK):
            part = content[at : at + CHUNK]
            self._socket.sendall(b"%s %d\n" % (kind.encode(), len(part)) + part)
            answer = self._line(time.monotonic() + 60)
            if answer != "A":
                raise GuestError(f"the agent answered {answer!r}")

    def _collect(self, number: int, deadline: float) -> Result:
        streams = {"O": bytearray(), "E": bytearray()}
        while True:
            kind, *numbers = self._line(deadline).split()
            if kind == "X" and int(numbers[0]) == number:
                return Result(int(numbers[1]), bytes(streams["O"]), bytes(streams["E"]))
            if kind not in streams:
                raise GuestError(
                    f"the agent answered {kind} {numbers} (did the guest start again?)"
                )
            streams[kind] += self._exactly(int(numbers[1]), deadline)

    def _line(self, deadline: float) -> str:
        while (end := self._buffer.find(b"\n")) < 0:
            self._receive(deadline)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line.decode(errors="replace").strip("\r")

    def _exactly(self, count: int, deadline: float) -> bytes:
        while len(self._buffer) < count:
            self._receive(deadline)
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _receive(self, deadline: float) -> None:
        self._socket.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            more = self._socket.recv(1 << 16)
        except TimeoutError:
            raise GuestError(
                f"the guest does not answer; {self._alive() or 'its QEMU lives'}"
            ) from None
        except OSError as error:
            raise GuestError(
                f"the channel broke: {error}; {self._alive() or 'its QEMU lives'}"
            ) from None
        if not more:
            raise GuestError(f"the channel closed: {self._alive() or 'its QEMU lives'}")
        self._buffer += more
