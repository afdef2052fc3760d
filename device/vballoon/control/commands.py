# SPDX-License-Identifier: Apache-2.0
"""The commands of the control socket, declared in one table.

``balloon``, ``query-balloon`` and the form of the statistics are those of QEMU (qapi/machine.json,
docs/virtio-balloon-stats.txt).  The others exist only here.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import time
from typing import TYPE_CHECKING, Any

import vballoon
from vballoon.control.diagnosis import problems
from vballoon.control.operator import plain
from vballoon.control.session import CommandError
from vballoon.control.table import Argument, Reply, Table
from vballoon.memory import PAGE_SIZE, resident_bytes
from vballoon.skipmap import FrozenExport, PageBitmap, Provenance, RoundKind
from vballoon.skipmap.cells import FULL, cell_pages, fill_of_cells
from vballoon.skipmap.map import data_pages
from virtio_formats.virtio.balloon import stat_name

if TYPE_CHECKING:
    from vballoon.control.operator import Operator

__all__ = ("COMMANDS",)

log = logging.getLogger(__name__)

COMMANDS = Table()
MAX_CELLS = 1 << 16
"""Maximum number of cells of a memory map: five fill bytes for each cell, 440 kB as JSON."""

STATS_POLLS, STATS_POLL_SECONDS = 25, 0.02
"""How often, and after how many seconds each, to look for new statistics before a target."""


# Commands that QEMU also has.


@COMMANDS.command(
    "balloon",
    {
        "value": Argument(int, "bytes of memory that the guest should have", minimum=1),
        "force": Argument(
            bool, "accept a target outside the limits, or without a driver", optional=True
        ),
    },
)
async def balloon(operator: Operator, value: int, force: bool = False) -> dict[str, Any]:
    """Ask the guest to inflate or deflate its balloon until it has *value* bytes.

    The guest does so in its own time: see query-balloon and the event BALLOON_CHANGE.  Without
    force, a target that the guest cannot see or that would leave it too little is an error.
    """
    if not force:
        if operator.balloon.ram_bytes:
            operator.require_config_space()
        await _refresh_stats(operator)
    operator.balloon.set_target(value, force=force)
    return {}


async def _refresh_stats(operator: Operator) -> None:
    """Wait for new statistics, briefly: a guest that does not answer is judged by its last."""
    before = operator.balloon.stats()
    if not operator.balloon.request_stats():
        return
    for _ in range(STATS_POLLS):
        if operator.balloon.stats() is not before:
            return
        await asyncio.sleep(STATS_POLL_SECONDS)


@COMMANDS.command("query-balloon")
def query_balloon(operator: Operator) -> dict[str, Any]:
    """Show how many bytes the guest has excluding the balloon, its target, floor and whole size.

    While ``driver-running`` is false, the number may be that of an earlier boot of the guest.
    """
    operator.require_memory()
    balloon = operator.balloon
    return {
        "actual": balloon.actual_bytes,
        "target": balloon.target_bytes,
        "floor": balloon.floor_bytes,
        "guest-memory": balloon.guest_bytes,
        "driver-running": balloon.driver_running,
    }


@COMMANDS.command("query-guest-stats")
def query_guest_stats(operator: Operator) -> dict[str, Any]:
    """Show the guest's latest memory statistics and their UNIX time (0: none yet)."""
    latest = operator.balloon.stats()
    return {
        "stats": {stat_name(tag): value for tag, value in latest.values.items()},
        "last-update": int(latest.last_update),
        "driver-running": operator.balloon.driver_running,
    }


@COMMANDS.command(
    "set-guest-stats-interval",
    {"seconds": Argument(int, "seconds between two requests, 0 for none", maximum=86400 * 365)},
)
def set_guest_stats_interval(operator: Operator, seconds: int) -> dict[str, Any]:
    """Request statistics from the guest now, and again each time the interval has passed."""
    operator.stats_interval = seconds
    operator.interval_changed()
    return {}


# Rounds.


@COMMANDS.command(
    "start-hinting",
    {
        "hold": Argument(
            bool, "the guest keeps the hinted pages allocated until stop-hinting", optional=True
        )
    },
)
def start_hinting(operator: Operator, hold: bool = False) -> dict[str, Any]:
    """Begin a free page hinting round; the event ROUND_COMPLETED reports its end.

    Start tracking writes before this command, or the bits cannot be used.
    """
    return {"round": operator.balloon.start_hinting(hold=hold)}


@COMMANDS.command("stop-hinting")
def stop_hinting(operator: Operator) -> dict[str, Any]:
    """End hinting: a round still running is voided, and the guest frees the hinted pages."""
    operator.balloon.stop_hinting()
    return {}


@COMMANDS.command(
    "start-walk",
    {
        "min-order": Argument(
            int, "smallest block to report is 2^min-order pages", optional=True, maximum=63
        )
    },
)
def start_walk(operator: Operator, min_order: int = 0) -> dict[str, Any]:
    """Begin a walk of the guest's free lists; the event ROUND_COMPLETED reports its end."""
    return {"round": operator.balloon.start_walk(min_order)}


@COMMANDS.command("stop-walk")
def stop_walk(operator: Operator) -> dict[str, Any]:
    """End the walk: a walk still running is voided."""
    operator.balloon.stop_walk()
    return {}


@COMMANDS.command(
    "query-round",
    {
        "kind": Argument(
            str, "default: the latest of either kind", optional=True, choices=("hint", "walk")
        )
    },
)
def query_round(operator: Operator, kind: str | None = None) -> dict[str, Any]:
    """Show a round: its times, whether it is complete, and if not, the reason."""
    rounds = operator.balloon.skipmap.rounds
    wanted = [RoundKind(kind)] if kind else list(RoundKind)
    found = [rounds[k] for k in wanted if k in rounds]
    if not found:
        name = f"{kind} round" if kind else "round"
        raise CommandError(f"no {name} yet; start one with start-hinting or start-walk")
    latest = max(found, key=lambda r: r.published.monotonic_ns)
    return latest.as_dict() | {"driver-running": operator.balloon.driver_running}


# The skip bitmap.


@COMMANDS.command("query-skip-bitmap")
def query_skip_bitmap(operator: Operator) -> dict[str, Any]:
    """Show the number of pages of each provenance, the guest's regions, and the rounds.

    ``ballooned`` and ``reported`` count the pages that may be left out now: those that are still
    holes in the backing file.
    """
    skipmap = operator.require_memory()
    return {
        "page-size": PAGE_SIZE,
        "guest-size": operator.balloon.ram_bytes,
        "pages": {p.value: skipmap.valid_now(p).count() for p in Provenance},
        "ballooned-ever": skipmap.count(Provenance.BALLOONED),
        "reported-ever": skipmap.count(Provenance.REPORTED),
        "regions": [
            {"guest-phys-addr": r.guest_phys_addr, "size": r.size, "file-offset": r.file_offset}
            for r in skipmap.layout.regions
        ],
        "rounds": [r.as_dict() for r in skipmap.rounds.values()],
        "poison": skipmap.poison,
        "dropped-ranges": skipmap.dropped,
    }


@COMMANDS.command("get-skip-export-fd")
async def get_skip_export_fd(operator: Operator) -> Reply:
    """Return the current skip bitmap as a memory file; a descriptor comes with the reply.

    The bitmaps come first, in the manifest's order, each from a multiple of 4096 bytes on; the
    manifest begins at manifest-offset. "vballoon export" writes them to files with its own
    permissions. The server writes none, so this socket gives no access to its files.
    """
    frozen = FrozenExport(operator.require_memory())
    fd, manifest_at, manifest = await asyncio.to_thread(frozen.to_descriptor)
    return Reply({"manifest-offset": manifest_at, "pages": manifest.pages}, (fd,))


@COMMANDS.command("get-skip-bitmap-fd")
def get_skip_bitmap_fd(operator: Operator) -> Reply:
    """Return the live bitmaps in a read-only memfd, which the reply carries (SCM_RIGHTS).

    The reply says where each bitmap is in the memfd.
    """
    skipmap = operator.require_memory()
    return Reply(skipmap.descriptor_layout(), (skipmap.open_fd(),))


@COMMANDS.command(
    "query-memory-map",
    {"cells": Argument(int, "maximum number of cells", minimum=1, maximum=MAX_CELLS)},
)
def query_memory_map(operator: Operator, cells: int) -> dict[str, Any]:
    """Show guest memory downsampled to cells: the share of each provenance in each cell.

    The share is a byte from 0 to 255; the bytes of a region are base64-encoded.
    """
    skipmap = operator.require_memory()
    resident = PageBitmap(skipmap.layout)
    for region in skipmap.memory.regions:
        resident.set_ranges(data_pages(region))
    seen = {"resident": resident} | {p.value: skipmap.valid_now(p) for p in Provenance}
    pages = cell_pages(skipmap.layout, cells)
    return {
        "cell-pages": pages,
        "full": FULL,
        "pages": {name: bitmap.count() for name, bitmap in seen.items()},
        "regions": [
            {
                "guest-phys-addr": region.guest_phys_addr,
                "size": region.size,
                "fill": {
                    name: base64.b64encode(fill_of_cells(bitmap, index, pages).data).decode()
                    for name, bitmap in seen.items()
                },
            }
            for index, region in enumerate(skipmap.layout.regions)
        ],
    }


# The server.


@COMMANDS.command("query-status")
def query_status(operator: Operator) -> dict[str, Any]:
    """Show the transport, its front-end, negotiated features, queues and counters."""
    balloon = operator.balloon
    transport = plain(operator.transport.status())
    transport["transport-counters"] = transport.pop("counters", {})
    return {
        "version": vballoon.__version__,
        "pid": os.getpid(),
        "uptime": round(time.monotonic() - operator.started, 3),
        "guest-size": balloon.ram_bytes,
        "actual": balloon.actual_bytes,
        "resident": resident_bytes(balloon.skipmap.memory.regions) if balloon.ram_bytes else 0,
        "target": balloon.target_bytes,
        "floor": balloon.floor_bytes,
        "guest-memory": balloon.guest_bytes,
        "driver-running": balloon.driver_running,
        "guest-stats-interval": operator.stats_interval,
        **transport,
        "counters": plain(balloon.counters),
        "rounds": [r.as_dict() for r in balloon.skipmap.rounds.values()],
        "problems": [found._asdict() for found in problems(_condition(operator))],
    }


def _condition(operator: Operator) -> dict[str, Any]:
    """Return the part of the status that shows problems."""
    status: dict[str, Any] = plain(operator.transport.status())
    return status | {"driver-running": operator.balloon.driver_running}


def log_problems(operator: Operator, known: set[str]) -> None:
    """Log each problem of the configuration once.  *known* has the names of those logged."""
    found = [problem for problem in problems(_condition(operator)) if problem.wrong]
    for problem in found:
        if problem.name not in known:
            log.warning("%s: %s; %s", problem.name, problem.what, problem.remedy)
    known.clear()
    known.update(problem.name for problem in found)


@COMMANDS.command("query-commands")
def query_commands(operator: Operator) -> list[dict[str, Any]]:
    """List the commands with their arguments."""
    del operator
    listed = [command.describe() for command in COMMANDS.commands.values()]
    negotiation = {"name": "qmp_capabilities", "help": "End the negotiation.", "arguments": []}
    return [negotiation, *listed]


@COMMANDS.command("quit")
def quit_(operator: Operator) -> dict[str, Any]:
    """End the server. QEMU may abort when it loses the device: see docs/operating.md."""
    operator.stop()
    return {}
