# SPDX-License-Identifier: Apache-2.0
"""Reports stay short: long exchanges are cut, failures that are alike are shown once."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from virtio_conformance.junit import render_junit
from virtio_conformance.page import render
from virtio_conformance.plugin import OPTIONS, _requirements
from virtio_conformance.record import Record, Run
from virtio_conformance.requirements.marks import SUITE
from virtio_conformance.target import Options, Target
from virtio_conformance.transcript import Transcript, shortened
from virtio_conformance.verdict import verdicts


@pytest.mark.parametrize(
    ("params", "rows"),
    [
        ({"packed": "split"}, ["split.a", "ring.c"]),
        ({"packed": "packed"}, ["packed.b", "ring.c"]),
        ({}, ["split.a", "packed.b", "ring.c"]),
    ],
)
def test_a_test_on_one_ring_layout_says_nothing_of_the_other(
    params: dict[str, str], rows: list[str]
) -> None:
    mark = SimpleNamespace(args=("split.a", "packed.b", "ring.c", "vf.d"))
    config = SimpleNamespace(stash={OPTIONS: Options(protocol="vhost-user")})
    item = SimpleNamespace(
        callspec=SimpleNamespace(params=params), iter_markers=lambda _: [mark], config=config
    )
    assert _requirements(cast("pytest.Item", item)) == rows


ROWS = ["split.used.id", "split.used.len-first"]


def transcript(messages: int) -> list[str]:
    kept = Transcript(first=3, last=5)
    for number in range(messages):
        kept.add(f"-> {number}")
    return kept.lines()


@pytest.mark.parametrize("messages", range(10))
def test_a_short_exchange_is_kept_whole(messages: int) -> None:
    whole = [f"-> {number}" for number in range(min(messages, 8))]
    assert messages > 8 or transcript(messages) == whole


def test_of_a_long_exchange_both_ends_are_kept_and_the_rest_counted() -> None:
    assert transcript(9) == [
        "-> 0", "-> 1", "-> 2", "... 1 message left out ...",
        "-> 4", "-> 5", "-> 6", "-> 7", "-> 8",
    ]  # fmt: skip
    lines = transcript(1000)
    assert lines[2:5] == ["-> 2", "... 992 messages left out ...", "-> 995"]


def test_shortening_again_counts_what_was_left_out_before() -> None:
    lines = shortened(transcript(1000), 1, 2)
    assert lines == ["-> 0", "... 997 messages left out ...", "-> 998", "-> 999"]
    assert shortened(lines, 1, 2) == lines


def failed(name: str, observed: str) -> Record:
    wire = "\n".join(f"-> {number}" for number in range(100))
    return Record(
        name,
        "failed",
        requirements=ROWS,
        broken=ROWS[0],
        observed=observed,
        wire=wire,
        repeat="again",
    )


def page(*records: Record) -> str:
    run = Run("vhost-user", "balloon", "backend", records=list(records))
    return render(run, verdicts(run))


def test_a_failure_is_shown_once_and_linked_from_its_row() -> None:
    text = page(failed("test_a.py::test_one", "Finding: here"))
    assert text.count("<details") == 1
    assert text.count(f'<a href="#broken-{ROWS[0]}">') == 1
    assert "left out" in text


def test_failures_that_differ_in_numbers_alone_are_shown_together() -> None:
    text = page(
        failed("test_a.py::test_one[3]", "Finding: buffers [3] are lost"),
        failed("test_a.py::test_one[4]", "Finding: buffers [4] are lost"),
        failed("test_a.py::test_one[5]", "Finding: the index is 5"),
    )
    assert text.count("<details") == 2
    assert "and 1 like it" in text
    assert "test_a.py::test_one[4]" in text


def test_a_long_line_is_cut() -> None:
    record = failed("test_a.py::test_one", "Finding: here")
    record.wire = "-> " + "00" * 5000
    assert len(page(record)) < len(page()) + 2000


def test_folders_of_a_spawned_backend_are_shown_as_in_its_command(tmp_path: Path) -> None:
    target = Target(Options())
    assert target.plain("left as it is") == "left as it is"
    target.folder, target.socket = tmp_path, str(tmp_path / "s")
    assert target.plain(f"{tmp_path}/s and {tmp_path}/disk") == "{socket} and {dir}/disk"


def test_the_schema_describes_what_is_written(tmp_path: Path) -> None:
    run = Run("vhost-user", "balloon", "backend", records=[failed("test_a.py::test_one", "here")])
    run.save(tmp_path / "results.json")
    written = json.loads((tmp_path / "results.json").read_text())
    schema = json.loads((SUITE.parent / "results.schema.json").read_text())
    assert set(written) == set(schema["properties"]) == set(schema["required"])
    assert written["schema"] == schema["properties"]["schema"]["const"]
    record = schema["properties"]["records"]["items"]
    assert set(written["records"][0]) == set(record["properties"]) == set(record["required"])
    assert Run.load(tmp_path / "results.json") == run


def test_junit_has_the_whole_text_of_a_failure() -> None:
    record = failed("test_a.py::test_one[\x01]", "Finding: a \x00 byte and <tags>")
    record.rings, record.backend = "queue 0: split", "the last line"
    open_question = Record("test_a.py::test_two", "inconclusive", observed="Hang: in set-up")
    run = Run("vhost-user", "balloon", "backend", records=[record, open_question])
    suite = ET.fromstring(render_junit(run))
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "1")
    text = suite.findtext("testcase/failure") or ""
    for part in ("<tags>", "queue 0: split", "the last line", "-> 99", ROWS[0], "again"):
        assert part in text
    assert suite.find("testcase/error") is not None
