# SPDX-License-Identifier: Apache-2.0
"""``vballoon metrics``: serve the figures of several machines to Prometheus."""

from __future__ import annotations

import argparse
import asyncio
import signal
import threading
import time
from typing import TYPE_CHECKING

from vballoon.cli.common import Subparsers, add_command
from vballoon.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vballoon.fleet.sample import Sample
    from vballoon.fleet.watching import Watcher

__all__ = ("add", "run")

EXAMPLES = """\
  vballoon metrics /run/vballoon/vm1.sock /run/vballoon/vm2.sock
  vballoon metrics --listen 127.0.0.1:9558 web=/run/vballoon/vm1.sock
"""
FRESH_SECONDS = 1.0
"""Scrapes that follow one another within this time get the same answers."""


def add(commands: Subparsers) -> None:
    """Declare the subcommand."""
    command = add_command(
        commands,
        "metrics",
        run,
        summary="serve metrics of machines to Prometheus",
        description=(
            "Ask control sockets whenever Prometheus asks here, and answer with their figures.\n"
            "A machine that does not answer in 5 seconds is 'vballoon_up 0' and delays no other.\n"
            "Needs the package prometheus_client: pip install 'vballoon[metrics]'."
        ),
        examples=EXAMPLES,
    )
    command.add_argument(
        "sockets", metavar="[NAME=]SOCKET", nargs="+", help="control sockets to ask"
    )
    command.add_argument(
        "--listen",
        metavar="ADDRESS:PORT",
        default="127.0.0.1:9558",
        help="where to serve /metrics (default: 127.0.0.1:9558, this host only)",
    )


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ModuleNotFoundError:
        raise UsageError(
            "prometheus_client is missing: run pip install 'vballoon[metrics]'"
        ) from None
    from vballoon.fleet.exposition import Fleet
    from vballoon.fleet.watching import Watcher, machines

    address, port = parse_address(options.listen)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    registry = CollectorRegistry()
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    answers = Answers(Watcher(machines(options.sockets)), loop)
    registry.register(Fleet(answers))
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        raise UsageError(f"{options.listen}: {error.strerror or error}") from None
    print(f"serving http://{address}:{server.server_port}/metrics", flush=True)
    ended.wait()
    server.shutdown()
    thread.join()
    answers.close()
    return 0


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``.  Raise UsageError for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{text} is not ADDRESS:PORT, for example 127.0.0.1:9558")
    return host.removeprefix("[").removesuffix("]"), int(port)


class Answers:
    """Asks for whichever thread calls, one at a time, and keeps the answers for a second."""

    def __init__(
        self,
        watcher: Watcher,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._watcher, self._loop, self._clock = watcher, loop, clock
        self._lock = threading.Lock()
        self._last: Sequence[Sample] = ()
        self._at = float("-inf")

    def __call__(self) -> Sequence[Sample]:
        """Return a sample of each machine, at most FRESH_SECONDS old."""
        with self._lock:
            if self._clock() - self._at >= FRESH_SECONDS:
                asking = self._watcher.ask()
                self._last = asyncio.run_coroutine_threadsafe(asking, self._loop).result()
                self._at = self._clock()
            return self._last

    def close(self) -> None:
        """End all connections, and the loop."""
        with self._lock:
            asyncio.run_coroutine_threadsafe(self._watcher.close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
