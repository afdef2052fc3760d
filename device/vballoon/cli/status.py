# SPDX-License-Identifier: Apache-2.0
"""``vballoon status``: show the state of a server as tables."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from vballoon.cli.common import Subparsers, add_command, size_text

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ("add", "run")

EXAMPLES = """\
  vballoon status control.sock
  vballoon status control.sock --watch 2     refresh every 2 seconds
  vballoon status control.sock --json        print JSON, for programs
"""


def add(commands: Subparsers) -> None:
    """Declare the subcommand."""
    command = add_command(
        commands,
        "status",
        run,
        summary="show the state of a server",
        description="Show memory, front-end, features, queues, rounds and counters of a server.",
        examples=EXAMPLES,
    )
    command.add_argument("socket", metavar="SOCKET", help="path of the control socket")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the replies as JSON")
    form.add_argument("--watch", metavar="SECONDS", type=float, help="refresh every SECONDS")


def run(options: argparse.Namespace) -> int:
    """Query the server and print the tables."""
    from vballoon.control.client import ControlClient

    with ControlClient(options.socket) as client:
        if options.json:
            print(json.dumps(_ask(client), indent=2))
            return 0
        from rich.console import Console

        console = Console()
        while True:
            console.print(render(_ask(client)))
            if options.watch is None:
                return 0
            time.sleep(max(0.1, options.watch))
            console.clear()


def _ask(client: Any) -> dict[str, Any]:
    answers: dict[str, Any] = {"status": client.execute("query-status")}
    if answers["status"]["guest-size"]:
        answers["skip-bitmap"] = client.execute("query-skip-bitmap")
        answers["guest-stats"] = client.execute("query-guest-stats")
    return answers


def render(answers: dict[str, Any]) -> RenderableType:
    """Return the replies as a renderable of rich."""
    from rich.console import Group

    status = answers["status"]
    parts = [_summary(answers), _queues(status)]
    parts += [f"problem: {p['what']}; {p['remedy']}" for p in status.get("problems", ())]
    if "skip-bitmap" in answers:
        parts.append(_bitmap(answers["skip-bitmap"]))
    if status["rounds"]:
        parts.append(_rounds(status["rounds"]))
    return Group(*parts)


def _table(title: str, *columns: str) -> Any:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    for name in columns:
        table.add_column(
            name, justify="left" if name in ("", "state", "queue", "void") else "right"
        )
    return table


def _summary(answers: dict[str, Any]) -> Any:
    status = answers["status"]
    table = _table(f"vballoon {status['version']}, process {status['pid']}", "", "")
    table.show_header = False
    table.columns[1].justify = "left"
    table.add_row("up for", f"{status['uptime']:.0f} s")
    connected = "front-end connected" if status.get("connected") else "no front-end"
    table.add_row(str(status.get("transport", "transport")), connected)
    size, actual = status["guest-size"], status["actual"]
    if size:
        table.add_row("guest memory", size_text(size))
        table.add_row("the guest has", f"{size_text(actual)} ({100 * actual / size:.1f} %)")
        limits = f"{size_text(status['target'])}, not below {size_text(status['floor'])}"
        table.add_row("target", limits)
        table.add_row("driver", "running" if status["driver-running"] else "not running")
    stats = answers.get("guest-stats", {"last-update": 0, "stats": {}})
    if stats["last-update"]:
        age = max(0, int(time.time()) - stats["last-update"])
        free = size_text(stats["stats"].get("stat-free-memory", 0))
        table.add_row("free in the guest", f"{free}, {age} s ago")
    table.add_row("features", ", ".join(_short(status.get("features", []))) or "none negotiated")
    table.add_row("protocol", ", ".join(status.get("protocol-features", [])) or "-")
    counters = {k: v for k, v in status["counters"].items() if v}
    table.add_row("counters", ", ".join(f"{k} {v}" for k, v in counters.items()) or "all zero")
    return table


def _short(names: list[str]) -> list[str]:
    return [n.removeprefix("VIRTIO_BALLOON_F_").removeprefix("VIRTIO_F_") for n in names]


def _queues(status: dict[str, Any]) -> Any:
    table = _table("queues", "queue", "state", "size", "taken", "given", "kicks", "interrupts")
    for queue in status.get("queues", []):
        state = f"[bold red]{queue['broken']}[/]" if queue.get("broken") else queue["state"]
        numbers = (queue.get(k, 0) for k in ("size", "taken", "given", "kicked", "notified"))
        table.add_row(str(queue["index"]), state, *(str(n) for n in numbers))
    return table


def _bitmap(shown: dict[str, Any]) -> Any:
    from vballoon.memory import PAGE_SIZE

    table = _table("skip bitmap", "", "pages", "memory", "of the guest")
    for name, pages in shown["pages"].items():
        share = 100 * pages * shown["page-size"] / shown["guest-size"]
        table.add_row(name, f"{pages:,}", size_text(pages * PAGE_SIZE), f"{share:.1f} %")
    return table


def _rounds(rounds: list[dict[str, Any]]) -> Any:
    table = _table("rounds", "", "round", "state", "records", "pages", "bad", "void")
    for found in rounds:
        why = found["void-reason"] or found["spoilt"] or ""
        numbers = (str(found[k]) for k in ("records", "pages", "bad-records"))
        table.add_row(found["kind"], str(found["round"]), found["state"], *numbers, why)
    return table
