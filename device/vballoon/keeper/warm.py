# SPDX-License-Identifier: Apache-2.0
"""The warm parent: everything is imported, and workers are forked from it in milliseconds.

It is a process of its own, started anew by ``exec`` after an upgrade, since a fork of the old one
would run old code.  It has one thread: NumPy's libraries would start more (OPENBLAS_NUM_THREADS).
It ends when the keeper's end of the socket closes; its workers run on.
"""

from __future__ import annotations

import gc
import importlib
import os
import pkgutil
import select
import signal
import socket
import sys
import traceback
from typing import Any

from fdsocket import close_fds
from vballoon.keeper import fault, spawn
from vballoon.keeper.logs import set_up_logging

__all__ = ("main",)


def main(arguments: list[str]) -> int:
    """Serve fork requests on the socket whose number is the first argument."""
    if arguments == ["--check"]:  # before an upgrade: does the installed program start?
        _import_everything()
        return 0
    control = socket.socket(fileno=int(arguments[0]))
    os.setsid()  # a terminal's Ctrl-C is for the keeper
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _import_everything()
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise SystemExit(f"vballoon: {threads} threads after import; a fork needs one")
    gc.collect()
    gc.freeze()
    _Warm(control).run()
    return 0


def _import_everything() -> None:
    """Load what a worker may need: it opens no file later."""
    import asyncio
    import concurrent.futures.thread
    import encodings.idna
    import linecache

    del asyncio, concurrent, encodings, linecache
    import vballoon

    vballoon.__version__ = vballoon.__version__  # from the metadata files, which are out of reach
    for info in pkgutil.walk_packages(vballoon.__path__, "vballoon."):
        if not info.name.startswith("vballoon.cli") and not info.name.endswith("__main__"):
            try:
                importlib.import_module(info.name)
            except ImportError:  # the compiled loops are optional
                continue


class _Warm:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._writer)

    def run(self) -> None:
        """Fork and reap until the keeper is gone."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._reader, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if self._reader in ready:
                self._reap()
            if self._control.fileno() in ready:
                packet = spawn.receive(self._control)
                if packet is None:
                    return
                self._start(*packet)

    def _start(self, message: dict[str, Any], fds: list[int]) -> None:
        wanted = message["start"]
        total = wanted.pop("fds")
        while len(fds) < total:
            packet = spawn.receive(self._control)
            if packet is None:
                return
            fds += packet[1]
        pid = os.fork()
        if not pid:
            self._become(spawn.Start(**wanted), fds)
        fault.advance()
        close_fds(fds)
        pidfd = os.pidfd_open(pid)
        try:
            spawn.send(self._control, {"started": pid}, [pidfd])
        except OSError:  # the keeper has gone, and nobody would ever end this worker
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)

    def _become(self, start: spawn.Start, fds: list[int]) -> None:
        """Be the worker; does not return."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            self._control.close()
            close_fds([self._reader, self._writer])
            set_up_logging(start.log_level, start.name)
            from vballoon.keeper.worker import run

            code = run(start, fds[0], fds[1:])
        except BaseException:
            for line in traceback.format_exc().splitlines()[-1:]:
                sys.stderr.write(f"vballoon: {start.name}: worker: {line}\n")
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        try:
            while os.read(self._reader, 512):
                pass
        except BlockingIOError:
            pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            try:
                spawn.send(self._control, {"exited": pid, "code": code})
            except OSError:
                return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
