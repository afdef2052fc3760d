# SPDX-License-Identifier: Apache-2.0
"""Many machines at once: answers are checked, nobody is waited for, figures are exposed."""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from rich.console import Console
from tests.fakes.frontend import Frontend
from tests.fakes.memory import make_memory
from tests.unit.test_cli_serve import Served, connected

from vballoon.cli import main, top
from vballoon.cli.metrics import Answers, parse_address
from vballoon.errors import UsageError
from vballoon.fleet.exposition import families
from vballoon.fleet.sample import AnswerError, Sample, parse, unreachable
from vballoon.fleet.watching import Machine, Watcher, machines

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
STATUS = {
    "guest-size": 64 * MIB,
    "actual": 32 * MIB,
    "target": 32 * MIB,
    "resident": 8 * MIB,
    "connected": True,
    "driver-running": True,
    "queues": [{"index": 0, "broken": None}, {"index": 4, "broken": "split.available-head"}],
    "counters": {"bad-walk": 3, "reported-pages": 7},
}
STATS = {"stats": {"stat-available-memory": 5 * MIB}, "last-update": 1}
BITMAP = {"page-size": 4096, "pages": {"ballooned": 8, "reported": 2}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def test_an_answer_becomes_a_sample():
    sample = parse("vm", STATUS, STATS, BITMAP)
    assert (sample.resident, sample.available) == (8 * MIB, 5 * MIB)
    assert (sample.ballooned, sample.reported) == (8 * 4096, 2 * 4096)
    assert sample.broken == ((4, "split.available-head"),)
    assert sample.state == "broken"
    assert parse("vm", {**STATUS, "queues": []}).state == "ok"
    assert parse("vm", {**STATUS, "queues": [], "driver-running": False}).state == "no driver"
    assert parse("vm", {**STATUS, "connected": False}).state == "waiting"
    assert parse("vm", {"guest-size": 0, "actual": 0}).actual is None


@pytest.mark.parametrize(
    "change",
    [
        {"actual": -1},
        {"actual": 1 << 64},
        {"actual": True},
        {"resident": 1.5},
        {"queues": {}},
        {"queues": [7]},
        {"queues": [{"index": "0", "broken": "split.index"}]},
        {"queues": [{"index": 0, "broken": 'x"} 1\nvballoon_up{vm="other'}]},
        {"queues": [{"index": 0}] * 1025},
        {"counters": {'a"} 1\nb': 1}},
        {"counters": {f"c{i}": 0 for i in range(65)}},
        {"counters": []},
    ],
)
def test_an_answer_of_another_shape_is_refused(change):
    with pytest.raises(AnswerError):
        parse("vm", {**STATUS, **change})


@given(st.sampled_from(sorted(STATUS)), JSON, JSON, JSON)
def test_no_answer_raises_anything_else(key, value, stats, bitmap):
    for said in (value, {**STATUS, key: value}):
        try:
            text = json.dumps([parse("vm", said, stats, bitmap).state])
        except AnswerError:
            continue
        assert text


def exposed(samples):
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families(samples)
        for sample in family.samples
    }


def test_what_is_not_known_has_no_line():
    found = exposed([parse("a", STATUS, STATS, BITMAP), unreachable("b", "refused")])
    assert found["vballoon_up", "a"] == 1
    assert found["vballoon_up", "b"] == 0
    assert found["vballoon_resident_bytes", "a"] == 8 * MIB
    assert found["vballoon_bad_walk_total", "a"] == 3
    assert found["vballoon_broken_queues", "a", "split.available-head"] == 1
    assert [key for key in found if key[1] == "b"] == [("vballoon_up", "b")]
    assert ("vballoon_target_bytes", "a") in found
    without = parse("a", {k: v for k, v in STATUS.items() if k != "target"})
    assert ("vballoon_target_bytes", "a") not in exposed([without])


def test_the_page_lists_every_metric():
    page = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8")
    table = page.partition("<!-- metrics")[2].partition("<!-- end -->")[0]
    rows = dict(re.findall(r"^\| `(vballoon_\w+)` \| (.+) \|$", table, re.MULTILINE))
    assert rows == {family.name: family.documentation for family in families([])}


def test_alerts_name_metrics_that_exist():
    text = (ROOT / "examples/monitoring/alerts.yml").read_text(encoding="utf-8")
    used = {name.removesuffix("_total") for name in re.findall(r"vballoon_\w+", text)}
    assert used
    assert used <= {family.name for family in families([])}


def test_machines_are_named(tmp_path):
    assert [m.name for m in machines(["/a/vm1.sock", "web=/b/x.sock"])] == ["vm1", "web"]
    assert [m.name for m in machines(["/a/c.sock", "/b/c.sock"])] == ["/a/c.sock", "/b/c.sock"]
    odd = tmp_path / "a=b.sock"
    odd.touch()
    assert [m.path for m in machines([str(odd)])] == [str(odd)]
    with pytest.raises(UsageError, match="two machines"):
        machines(["x=/a", "x=/b"])


@pytest.mark.parametrize("text", ["9558", "host:", ":1", "h:99999", "h:-1", "h:²"])
def test_a_bad_address_is_refused(text):
    with pytest.raises(UsageError):
        parse_address(text)


def test_an_address_can_be_ipv6():
    assert parse_address("[::1]:80") == ("::1", 80)


class Odd:
    """A control socket that does not behave: *greeting* is sent, every request gets *answer*."""

    def __init__(self, path, greeting=b"", answer=b""):
        self.path, self.greeting, self.answer = str(path), greeting, answer

    def __enter__(self):
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(self.path)
        self.listening.listen()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.listening.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listening.close()

    def run(self):
        try:
            sock, _ = self.listening.accept()
            with sock:
                sock.sendall(self.greeting)
                while sock.recv(4096):
                    sock.sendall(self.answer)
        except OSError:
            pass


GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'


@pytest.mark.parametrize(
    ("greeting", "answer", "said"),
    [
        (b"", b"", "no answer within"),
        (GREETING, b"", "no answer within"),
        (GREETING, b'{"event": "X"}\n' * 100, ""),
        (b"hello\n", b"", ""),
        (GREETING, b"[" * (1 << 16), ""),
        (b"x" * (5 << 20), b"", ""),
    ],
    ids=["silent", "mute", "events only", "no QMP", "half", "endless line"],
)
def test_a_server_that_misbehaves_is_unreachable_and_delays_nobody(
    tmp_path, greeting, answer, said
):

    async def ask():
        watched = [Machine("odd", str(tmp_path / "odd")), Machine("none", "/nonexistent")]
        async with Watcher(watched) as watcher:
            return await watcher.ask(0.5)

    with Odd(tmp_path / "odd", greeting, answer):
        found, none = asyncio.run(ask())
    assert found.state == none.state == "unreachable"
    assert said in found.error
    assert none.error == "No such file or directory"


def test_scrapes_at_once_ask_once():
    asked = []

    class Counting:
        async def ask(self):
            asked.append(1)
            return [unreachable("a", "x")]

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    now = [0.0]
    answers = Answers(Counting(), loop, clock=lambda: now[0])
    assert answers() == answers() == [unreachable("a", "x")]
    now[0] = 1.0
    answers()
    assert len(asked) == 2
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


SAMPLES = [
    Sample("a", connected=True, resident=10),
    Sample("b", connected=True, resident=30),
    unreachable("c", "refused"),
]


def names(view):
    return [sample.name for sample in view.rows]


def test_keys_sort_and_choose():
    view = top.View(SAMPLES)
    assert names(view) == ["a", "b", "c"]
    for _ in range(2):
        view.press("s")
    view.press("r")
    assert names(view) == ["b", "a", "c"], "what is not known comes last either way"
    assert view.chosen == "b"
    view.press("up")
    assert view.chosen == "b"
    for _ in range(5):
        view.press("down")
    assert view.chosen == "c"
    view.update(SAMPLES[:1])
    assert view.chosen == "a"
    assert top.View([]).chosen is None


def drawn(view, width, **options):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(view.table(width, **options))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 200])
def test_a_table_fits_its_width(width):
    many = [
        Sample(
            f"machine-with-a-long-name-{index}",
            connected=True,
            driver_running=False,
            restarts=99,
            **dict.fromkeys(("resident", "target", "actual", "available", "reported"), 1023 << 20),
        )
        for index in range(50)
    ]
    text = drawn(top.View(many), width, room=19, cursor=True)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 24
    assert text.count("1023M") == 5 * 19
    assert "no driver" in text


def test_a_failed_machine_is_explained():
    assert "c: refused" in drawn(top.View(SAMPLES), 80)


def test_bars_grow_from_zero_to_the_largest():
    assert top.bars([0, 4, 8, None]) == "▁▄█ "
    assert top.bars([]) == ""


@pytest.fixture
def served(tmp_path):
    device, operator = tmp_path / "b", tmp_path / "vm1.sock"
    with Served("--vhost-user", device, "--control", operator) as server:
        frontend = Frontend(connected(device), make_memory((0, 64 << 20)))
        with frontend:
            frontend.negotiate()
            frontend.share_memory()
            frontend.memory.write(0, b"x" * 8192)
            frontend.status_ok()
            yield operator
        server.end()


def test_real_servers_are_shown_and_scraped(served, tmp_path, capsys):
    assert main(["top", "--json", str(served)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == "vm1"
    assert row["guest_size"] == 64 * MIB
    assert row["resident"] == 8192
    assert main(["top", "--once", str(served), str(tmp_path / "none")]) == 1
    shown = capsys.readouterr().out
    assert "vm1" in shown
    assert "No such file" in shown
    scraper = subprocess.Popen(
        [sys.executable, "-m", "vballoon", "metrics", "--listen", "127.0.0.1:0", str(served)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        url = scraper.stdout.readline().split()[-1]
        request = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read().decode()
        found = {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert found["vballoon_up"] == 1
        assert found["vballoon_resident_bytes"] == 8192
        scraper.send_signal(signal.SIGTERM)
        _, said = scraper.communicate(timeout=60)
        assert (scraper.returncode, said) == (0, "")
    finally:
        scraper.kill()
        scraper.wait()
        scraper.stdout.close()
        scraper.stderr.close()
