# SPDX-License-Identifier: Apache-2.0
"""The operator's commands, declared in one table.

``balloon``, ``query-balloon`` and the shape of the statistics are QEMU's (qapi/machine.json and
docs/virtio-balloon-stats.txt of QEMU); the others are this device's own.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
from typing import TYPE_CHECKING, Any

import vballoon
from vballoon.control.operator import plain
from vballoon.control.session import CommandError
from vballoon.control.table import Argument, Reply, Table
from vballoon.skipmap import FrozenExport, PageBitmap, Provenance, RoundKind
from vballoon.skipmap.cells import FULL, cell_pages, fill_of_cells
from vballoon.skipmap.map import data_pages
from virtio_formats.virtio.balloon import stat_name

if TYPE_CHECKING:
    from vballoon.control.operator import Operator

__all__ = ("COMMANDS",)

COMMANDS = Table()
MAX_CELLS = 1 << 16
"""Cells of a memory map: five bitmaps of as many bytes, 440 kB as JSON."""


# The balloon, as QEMU means it.


@COMMANDS.command(
    "balloon",
    {"value": Argument(int, "bytes of memory that the guest should have", minimum=1)},
)
def balloon(operator: Operator, value: int) -> dict[str, Any]:
    """Ask the guest to give memory back, or to take it again.

    The guest follows when it can: see query-balloon and the event BALLOON_CHANGE.
    """
    operator.balloon.set_target(value)
    return {}


@COMMANDS.command("query-balloon")
def query_balloon(operator: Operator) -> dict[str, Any]:
    """Show how many bytes of memory the guest has, its balloon taken off."""
    operator.require_memory()
    return {"actual": operator.balloon.actual_bytes}


@COMMANDS.command("query-guest-stats")
def query_guest_stats(operator: Operator) -> dict[str, Any]:
    """Show the guest's latest memory statistics and when they came (0: never yet)."""
    latest = operator.balloon.stats()
    return {
        "stats": {stat_name(tag): value for tag, value in latest.values.items()},
        "last-update": int(latest.last_update),
    }


@COMMANDS.command(
    "set-guest-stats-interval",
    {"seconds": Argument(int, "seconds between two requests, 0 for none", maximum=86400 * 365)},
)
def set_guest_stats_interval(operator: Operator, seconds: int) -> dict[str, Any]:
    """Ask the guest for its statistics now and then every so many seconds."""
    operator.stats_interval = seconds
    operator.interval_changed()
    return {}


# Rounds.


@COMMANDS.command(
    "start-hinting",
    {
        "hold": Argument(
            bool, "the guest keeps the hinted pages back until stop-hinting", optional=True
        )
    },
)
def start_hinting(operator: Operator, hold: bool = False) -> dict[str, Any]:
    """Begin a free page hinting round; the event ROUND_COMPLETED tells its end.

    Tracking of writes must have begun before, or the bits cannot be used.
    """
    return {"round": operator.balloon.start_hinting(hold=hold)}


@COMMANDS.command("stop-hinting")
def stop_hinting(operator: Operator) -> dict[str, Any]:
    """End hinting: a round that still goes is void, and the guest takes its pages back."""
    operator.balloon.stop_hinting()
    return {}


@COMMANDS.command(
    "start-walk",
    {
        "min-order": Argument(
            int, "smallest blocks to tell: 2^order pages", optional=True, maximum=63
        )
    },
)
def start_walk(operator: Operator, min_order: int = 0) -> dict[str, Any]:
    """Have the guest's free lists walked; the event ROUND_COMPLETED tells the end."""
    return {"round": operator.balloon.start_walk(min_order)}


@COMMANDS.command("stop-walk")
def stop_walk(operator: Operator) -> dict[str, Any]:
    """End the walk; one that still goes is void."""
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
    """Show a round: its times, whether it is complete, and why not."""
    rounds = operator.balloon.skipmap.rounds
    wanted = [RoundKind(kind)] if kind else list(RoundKind)
    found = [rounds[k] for k in wanted if k in rounds]
    if not found:
        raise CommandError(f"there has been no {kind + ' ' if kind else ''}round yet")
    return max(found, key=lambda r: r.published.monotonic_ns).as_dict()


# The skip bitmap.


@COMMANDS.command("query-skip-bitmap")
def query_skip_bitmap(operator: Operator) -> dict[str, Any]:
    """Show how many pages each provenance has, the guest's regions, and the rounds.

    ``reported`` are the pages that are still holes of the backing file.
    """
    skipmap = operator.require_memory()
    return {
        "page-size": 4096,
        "guest-size": operator.balloon.ram_bytes,
        "pages": {p.value: skipmap.count(p) for p in Provenance}
        | {"reported": skipmap.reported_now().count()},
        "reported-ever": skipmap.count(Provenance.REPORTED),
        "regions": [
            {"guest-phys-addr": r.guest_phys_addr, "size": r.size, "file-offset": r.file_offset}
            for r in skipmap.layout.regions
        ],
        "rounds": [r.as_dict() for r in skipmap.rounds.values()],
        "poison": skipmap.poison,
        "dropped-ranges": skipmap.dropped,
    }


@COMMANDS.command(
    "export-skip-bitmap",
    {"directory": Argument(str, "absolute path of a directory that is not there yet")},
)
async def export_skip_bitmap(operator: Operator, directory: str) -> dict[str, Any]:
    """Write the skip bitmap as it is now: a manifest and raw bitmaps with checksums."""
    if not os.path.isabs(directory) or "\0" in directory:
        raise CommandError("Parameter 'directory' expects an absolute path")
    frozen = FrozenExport(operator.require_memory())
    manifest = await asyncio.to_thread(frozen.write, directory)
    return {"directory": directory, "pages": manifest.pages}


@COMMANDS.command("get-skip-bitmap-fd")
def get_skip_bitmap_fd(operator: Operator) -> Reply:
    """Hand out the live bitmaps: a read-only memory descriptor comes with the reply (SCM_RIGHTS).

    The reply says where each bitmap is in it.
    """
    skipmap = operator.require_memory()
    return Reply(skipmap.descriptor_layout(), (skipmap.open_fd(),))


@COMMANDS.command(
    "query-memory-map",
    {"cells": Argument(int, "at most so many cells", minimum=1, maximum=MAX_CELLS)},
)
def query_memory_map(operator: Operator, cells: int) -> dict[str, Any]:
    """Show guest memory from afar: in cells, how full each is of resident, ballooned … pages.

    A cell's fill is a byte from 0 to 255, all bytes of a region base64-encoded.
    """
    skipmap = operator.require_memory()
    resident = PageBitmap(skipmap.layout)
    for region in skipmap.memory.regions:
        resident.set_ranges(*data_pages(region))
    seen = {"resident": resident} | {p.value: skipmap.bitmap(p) for p in Provenance}
    seen["reported"] = skipmap.reported_now()
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
        "guest-stats-interval": operator.stats_interval,
        **transport,
        "counters": plain(balloon.counters),
        "rounds": [r.as_dict() for r in balloon.skipmap.rounds.values()],
    }


@COMMANDS.command("query-commands")
def query_commands(operator: Operator) -> list[dict[str, Any]]:
    """List the commands with their arguments."""
    del operator
    listed = [command.describe() for command in COMMANDS.commands.values()]
    negotiation = {"name": "qmp_capabilities", "help": "End the negotiation.", "arguments": []}
    return [negotiation, *listed]


@COMMANDS.command("quit")
def quit_(operator: Operator) -> dict[str, Any]:
    """End the server. A front-end that cannot reconnect may end its guest: see the manual."""
    operator.stop()
    return {}
