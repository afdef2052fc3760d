# SPDX-License-Identifier: Apache-2.0
"""A balloon without a guest, for tests of the operator's socket and of the command line."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass, field

from tests.fakes.memory import make_memory
from tests.unit.test_skipmap_map import MIB

from vballoon.balloon.counters import Counters
from vballoon.control.operator import Operator
from vballoon.control.server import ControlServer
from vballoon.errors import UsageError
from vballoon.keeper.listening import Listening
from vballoon.memory import GuestMemory
from vballoon.skipmap import Round, RoundKind, SkipMap
from vballoon.virtio import QueueStatus
from virtio_formats.virtio.balloon import StatTag


@dataclass
class FakeStats:
    values: dict = field(default_factory=dict)
    last_update: float = 0.0


class FakeBalloon:
    """A balloon that obeys at once; *memory* False: no front-end has connected."""

    def __init__(self, *, memory=True):
        self.events = lambda name, data: None
        self.memory = make_memory((0, 4 * MIB), (1 << 32, 2 * MIB)) if memory else GuestMemory()
        self.skipmap = SkipMap(self.memory)
        self.counters = Counters(inflated_pages=3)
        self.ram_bytes = self.actual_bytes = self.memory.size
        self.driver_running = True
        self.stats_interval = 0
        self.latest = FakeStats()
        self.calls = []
        self.requested = 0

    @property
    def guest_bytes(self):
        return self.ram_bytes

    @property
    def target_bytes(self):
        return self.actual_bytes

    floor_bytes = 2 << 20

    def set_target(self, value, *, force=False):
        if not self.ram_bytes:
            raise UsageError("no guest memory yet: wait until a front-end has connected")
        self.actual_bytes = value
        self.events("BALLOON_CHANGE", {"actual": value})

    def stats(self):
        return self.latest

    def request_stats(self):
        self.requested += 1
        self.latest = FakeStats({StatTag.MEMFREE: 1 << 40}, 1700000000.5)
        return True

    def start_hinting(self, *, hold=False):
        self.calls.append(("start_hinting", hold))
        return self._begin(RoundKind.HINT)

    def stop_hinting(self):
        self.skipmap.rounds[RoundKind.HINT].void("stopped by the operator")

    def start_walk(self, min_order=0):
        self.calls.append(("start_walk", min_order))
        return self._begin(RoundKind.WALK)

    def stop_walk(self):
        self.calls.append(("stop_walk",))

    def _begin(self, kind):
        round_ = Round(id=len(self.calls) + 1, kind=kind)
        self.skipmap.begin_round(round_)
        return round_.id

    def close(self):
        self.skipmap.close()
        for region in self.memory.regions:
            region.close()


@dataclass
class FakeStatus:
    transport: str = "vhost-user"
    connected: bool = True
    features: tuple = ("VIRTIO_BALLOON_F_STATS_VQ",)
    protocol_features: tuple = ("MQ", "CONFIG")
    queues: tuple = (QueueStatus(0, "running", 128, taken=5), QueueStatus(2, "broken", 8, "rule-x"))
    counters: dict = field(default_factory=lambda: {"GET_FEATURES": 1})


class FakeTransport:
    def status(self):
        return FakeStatus()


@contextlib.contextmanager
def served(path, balloon=None):
    """Run a control server on *path* in its own thread; yield (server, call in its loop)."""
    balloon = balloon or FakeBalloon()
    operator = Operator(balloon, FakeTransport())
    server = ControlServer(operator)
    loop = asyncio.new_event_loop()
    ready, stop = threading.Event(), asyncio.Event()
    operator.stop = stop.set

    refused = []

    async def main():
        listening = Listening()
        try:
            listening.open(str(path), private=True)
            server.start(listening.take(str(path)))
        except UsageError as error:
            refused.append(error)
            return
        finally:
            ready.set()
        await stop.wait()
        server.close()
        listening.close()
        for _ in range(100):
            if not server.clients:
                break
            await asyncio.sleep(0.01)

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    assert ready.wait(10)
    if refused:
        thread.join(20)
        loop.close()
        balloon.close()
        raise refused[0]

    def call(function, *args):
        async def run():
            return function(*args)

        return asyncio.run_coroutine_threadsafe(run(), loop).result(10)

    try:
        yield server, call
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive()
        loop.close()
        balloon.close()
