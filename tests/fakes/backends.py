# SPDX-License-Identifier: Apache-2.0
"""A vhost-user back-end under test, in a thread of this process or in a process to be killed."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from tests.fakes.echo_device import EchoDevice

from vballoon.vhost_user import VhostUserServer
from vballoon.virtio import TransportEvents

PR_SET_PDEATHSIG = 1


class Backend:
    """A server in its own thread.  ``on_loop`` runs a function in the server's loop."""

    def __init__(self, server: VhostUserServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server, self.loop = server, loop

    @property
    def device(self):
        return self.server.device

    def on_loop(self, function: Callable, *args):
        async def call():
            return function(*args)

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)

    def status(self):
        return self.on_loop(self.server.status)


@contextlib.contextmanager
def backend_thread(device, **options) -> Iterator[Backend]:
    """Serve *device* (options: those of VhostUserServer) until the block is left."""
    loop = asyncio.new_event_loop()
    server = VhostUserServer(device, **options)
    server.open()
    trouble: list[BaseException] = []

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(server.serve())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            trouble.append(error)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    loop.set_exception_handler(lambda _, context: trouble.append(RuntimeError(str(context))))
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield Backend(server, loop)
    finally:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(server.close)
        thread.join(10)
        assert not thread.is_alive(), "the server does not stop"
        assert not trouble, f"raised out of the loop: {trouble}"


class KillableBackend:
    """A child process that serves an echo device on *listener*, and dies by SIGKILL."""

    def __init__(self, listener: socket.socket, *, device: dict, **options) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            try:
                # The child must end even if a test fails before it kills the child.
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                logging.disable(logging.CRITICAL)
                fd = os.dup(listener.fileno())
                server = VhostUserServer(EchoDevice(**device), fd=fd, **options)
                asyncio.run(server.serve())
            finally:
                os._exit(1)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        assert os.WIFSIGNALED(status), "the back-end ended before it was killed"


class Recorder(TransportEvents):
    """Record the events that the transport reports."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def frontend_connected(self) -> None:
        self.told.append(("connected",))

    def frontend_disconnected(self, reason: str) -> None:
        self.told.append(("disconnected", reason))

    def queue_broken(self, index: int, rule: str, detail: str) -> None:
        self.told.append(("broken", index, rule))
