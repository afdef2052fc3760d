# SPDX-License-Identifier: Apache-2.0
"""vballoon.cli against a control server without a guest."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tests.roots import import_path
from tests.unit.control_fakes import FakeBalloon, served
from tests.unit.test_skipmap_map import begun, put

from vballoon.cli import main
from vballoon.cli.common import parse_size, size_text
from vballoon.cli.picture import CATEGORIES, COLOURS, MemoryPicture, PictureRegion
from vballoon.cli.terminal import show
from vballoon.memory import PageRanges
from vballoon.skipmap import Provenance, RoundKind, SkipExport

B, R, H, W = Provenance
COMMANDS = ("serve", "ctl", "status", "map", "export", "bitmap")


@pytest.fixture
def balloon():
    balloon = FakeBalloon()
    begun(balloon.skipmap, RoundKind.HINT, 4).end()
    put(balloon.skipmap, B, (0, 256))
    put(balloon.skipmap, H, (512, 1024))
    balloon.memory.regions[1].view[: 100 * 4096] = 1
    return balloon


@pytest.fixture
def sock(tmp_path, balloon):
    path = tmp_path / "control.sock"
    with served(path, balloon):
        yield str(path)


def failed(capsys, *words):
    """Run *words*, expect a failure, and return its one line of standard error."""
    assert main([str(w) for w in words]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vballoon: ")
    assert captured.err.count("\n") == 1
    return captured.err


# help and errors


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"vballoon {command}" in text.split("examples:")[1]


@pytest.mark.parametrize("words", [[], ["nonsense"], ["ctl"], ["map", "a", "--bad"]])
def test_wrong_usage_is_code_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("vballoon 0.")


@pytest.mark.parametrize(
    "words",
    [
        ["ctl", "/nowhere/sock", "query-status"],
        ["status", "/nowhere/sock"],
        ["map", "/nowhere/sock"],
        ["export", "/nowhere/sock", "/nowhere/dir"],
        ["bitmap", "show", "/nowhere"],
        ["bitmap", "verify", "/nowhere"],
        ["bitmap", "diff", "/nowhere", "/nowhere"],
        ["bitmap", "and", "/nowhere", "-o", "/nowhere/o"],
        ["serve"],
        ["serve", "--config", "/nowhere"],
        ["serve", "--vhost-user", "/nowhere/sock"],
        ["serve", "--vhost-user", "x", "--client", "--config", "/nowhere"],
    ],
)
def test_every_failure_is_one_line(words, capsys):
    if "--client" in words:
        with pytest.raises(SystemExit):
            main(words)
        return
    failed(capsys, *words)


def test_a_socket_that_is_no_control_socket(tmp_path, capsys):
    import socket
    import threading

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()

    def answer():
        connection, _ = listener.accept()
        connection.sendall(b"220 smtp ready\r\n")
        connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    assert "does not speak QMP" in failed(capsys, "status", tmp_path / "s")
    thread.join()
    listener.close()


# ctl


def test_ctl(sock, balloon, capsys):
    assert main(["ctl", sock, "balloon", "value=2M"]) == 0
    assert json.loads(capsys.readouterr().out) == {}
    assert balloon.actual_bytes == 2 << 20
    assert main(["ctl", sock, "start-hinting", "hold=true"]) == 0
    assert balloon.calls == [("start_hinting", True)]


def test_ctl_waits_for_an_event(sock, capsys):
    assert main(["ctl", sock, "balloon", "value=4096", "--wait", "BALLOON_CHANGE"]) == 0
    assert '"actual": 4096' in capsys.readouterr().out
    assert main(["ctl", sock, "query-balloon", "--wait", "NEVER", "--timeout", "0.2"]) == 1
    assert "no NEVER within 0.2 s" in capsys.readouterr().err


def test_ctl_help_lists_the_server_s_commands(sock, capsys):
    assert main(["ctl", sock, "help"]) == 0
    text = capsys.readouterr().out
    assert "set-guest-stats-interval" in text
    assert "seconds=  (integer)" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["query-ballon"], "did you mean query-balloon"),
        (["xyzzy"], "run 'help' to list the commands"),
        (["balloon", "5"], "'5' is not of the form KEY=VALUE"),
        (["balloon", "size=5"], "this command takes: value"),
        (["balloon", "value=lots"], "'lots' is not a number"),
        (["balloon", "value=1.3K"], "is not a number"),
        (["start-hinting", "hold=maybe"], "write true or false"),
        (["balloon"], "'value' is missing"),
        (["query-round", "kind=walk"], "no walk round yet"),
    ],
)
def test_ctl_says_what_is_wrong(sock, capsys, words, says):
    assert says in failed(capsys, "ctl", sock, *words)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("4096", 4096), ("0x10", 16), ("2G", 2 << 30), ("2GiB", 2 << 30), ("1.5k", 1536)],
)
def test_parse_size(text, value):
    assert parse_size(text) == value


def test_size_text():
    assert [size_text(n) for n in (0, 1023, 1536, 1 << 30, 1 << 52)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1 GiB",
        "4096 TiB",
    ]


# status


def test_status(sock, capsys):
    assert main(["status", sock]) == 0
    text = capsys.readouterr().out
    for words in ("vhost-user", "front-end connected", "STATS_VQ", "rule-x", "ballooned", "hint"):
        assert words in text
    assert main(["status", sock, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert answers["skip-bitmap"]["pages"]["ballooned"] == 256


def test_status_without_a_guest(tmp_path, capsys):
    path = tmp_path / "c"
    with served(path, FakeBalloon(memory=False)):
        assert main(["status", str(path)]) == 0
        assert "vballoon" in capsys.readouterr().out
        assert "no guest memory yet" in failed(capsys, "map", path)


# export and bitmap


def test_export_in_all_formats(sock, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", sock, str(out), "--format", "ranges", "--format", "png"]) == 0
    assert "256 pages" in capsys.readouterr().out
    assert (out / "ranges.csv").read_text().splitlines() == [
        "provenance,first_pfn,pages",
        "ballooned,0,256",
        "hinted,512,512",
    ]
    with Image.open(out / "map.png") as image:
        assert image.size[0] > 256 * 3
    assert SkipExport(out).bitmap(H).count() == 512
    assert "cannot export to" in failed(capsys, "export", sock, out)


def test_export_to_a_relative_path(sock, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", sock, "here"]) == 0
    assert (tmp_path / "here" / "manifest.json").exists()


def test_bitmap_show_diff_verify(sock, balloon, tmp_path, capsys):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    main(["export", sock, one])
    put(balloon.skipmap, B, (256, 300))
    balloon.skipmap.clear_ranges(H, PageRanges([512], [513]))
    balloon.skipmap.rounds[RoundKind.HINT].complete = False
    main(["export", sock, two])
    capsys.readouterr()
    assert main(["bitmap", "verify", one]) == 0
    assert main(["bitmap", "diff", one, one]) == 0
    capsys.readouterr()
    assert main(["bitmap", "diff", one, two]) == 1
    text = capsys.readouterr().out
    assert "44 pages gained" in text
    assert "1 pages lost" in text
    assert main(["bitmap", "show", two]) == 0
    assert "do not use: hint round 4 is incomplete" in capsys.readouterr().out
    assert main(["bitmap", "verify", two]) == 1
    assert "incomplete" in capsys.readouterr().err
    (tmp_path / "one" / "walked-1.bitmap").write_bytes(b"\1" + bytes(63))
    assert "checksum" in failed(capsys, "bitmap", "verify", one)


def test_bitmap_and_is_the_safety_rule(sock, tmp_path, capsys):
    main(["export", sock, str(tmp_path / "out")])
    hinted = tmp_path / "out" / "hinted-0.bitmap"
    dirty = np.zeros(16, dtype=np.uint64)
    dirty[8] = 0b101  # pages 512 and 514
    dirty.tofile(tmp_path / "dirty")
    capsys.readouterr()
    words = ["bitmap", "and", hinted, "--not", tmp_path / "dirty", "-o", tmp_path / "skip"]
    assert main([str(w) for w in words]) == 0
    assert capsys.readouterr().out.startswith("510 pages")
    skip = np.fromfile(tmp_path / "skip", dtype=np.uint64)
    assert int(skip[8]) == 2**64 - 1 - 0b101
    (tmp_path / "short").write_bytes(bytes(8))
    assert "1 words" in failed(capsys, "bitmap", "and", hinted, tmp_path / "short", "-o", "x")
    (tmp_path / "odd").write_bytes(bytes(9))
    assert "whole number" in failed(capsys, "bitmap", "and", tmp_path / "odd", "-o", "x")


# pictures


def picture():
    def fill(**some):
        return {c: bytes(some.get(c, [0] * 8)) for c in CATEGORIES}

    low = fill(resident=[255] * 4 + [0] * 4, ballooned=[0, 255, 3] + [0] * 5)
    high = fill(hinted=[0, 255] + [0] * 6, walked=[0, 0, 255] + [0] * 5)
    return MemoryPicture(
        4096 * 16,
        [PictureRegion(0, 8 << 16, low), PictureRegion(1 << 32, 8 << 16, high)],
        {"resident": 64, "ballooned": 17, "hinted": 16, "walked": 16, "reported": 0},
    )


def test_colours_and_letters():
    low, high = picture().regions
    assert low.colour(0) == COLOURS["resident"]
    assert low.colour(1) == COLOURS["ballooned"]
    assert low.colour(2) not in (COLOURS["resident"], COLOURS["ballooned"]), "a page shows"
    assert [low.dominant(i) for i in range(5)] == [
        "resident",
        "ballooned",
        "resident",
        "resident",
        None,
    ]
    assert [high.dominant(i) for i in range(4)] == [None, "hinted", "walked", None]


def test_terminal_without_colours():
    text = io.StringIO()
    show(picture(), Console(file=text, width=80, color_system=None))
    lines = text.getvalue().splitlines()
    assert lines[1] == "0000 0000 0000 #b##...."
    assert lines[2] == "0001 0000 0000 .hw....."
    assert "1 MiB of guest memory, a cell is 64 KiB" in lines[0]
    assert any("ballooned" in line and "68 KiB" in line for line in lines)


def test_terminal_with_colours_has_two_rows_in_a_line():
    text = io.StringIO()
    console = Console(file=text, width=25, color_system="truecolor", force_terminal=True)
    show(picture(), console)
    line = next(line for line in text.getvalue().splitlines() if "▀" in line)
    red, green, blue = COLOURS["resident"]
    assert line.count("▀") == 8
    assert f"38;2;{red};{green};{blue}" in line


def test_map_of_a_server(sock, tmp_path, capsys):
    assert main(["map", sock]) == 0
    text = capsys.readouterr().out
    assert "6 MiB of guest memory" in text
    assert re.search(r"resident +400 KiB", text)
    assert main(["map", sock, "--png", str(tmp_path / "m.png")]) == 0
    with Image.open(tmp_path / "m.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {COLOURS["resident"], COLOURS["ballooned"], COLOURS["hinted"]} <= colours
    bad = tmp_path / "no" / "m.png"
    assert "No such file" in failed(capsys, "map", sock, "--png", bad)


def test_map_of_an_export(sock, tmp_path, capsys):
    main(["export", sock, str(tmp_path / "out")])
    capsys.readouterr()
    assert main(["map", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "resident" not in text, "an export has no resident pages"
    assert re.search(r"ballooned +1 MiB", text)


def test_output_into_a_closed_pipe_is_no_traceback(sock):
    import subprocess
    import sys

    done = subprocess.run(
        f"{sys.executable} -m vballoon ctl {sock} help | head -c 10",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": import_path()},
    )
    assert done.stderr == ""
