# SPDX-License-Identifier: Apache-2.0
"""Verdicts accuse a back-end of what a test found, and of nothing else."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from virtio_conformance import run as command
from virtio_conformance.baseline import Baseline, failures
from virtio_conformance.findings import Crash, Finding, about, preparing, require
from virtio_conformance.numbering import SCHEMES, Numbering
from virtio_conformance.plugin import broken_row
from virtio_conformance.record import Record, Run
from virtio_conformance.requirements import by_id, chapters, retired
from virtio_conformance.requirements.marks import SUITE, marked_tests, named_rows
from virtio_conformance.target import fill
from virtio_conformance.verdict import exit_status, verdicts

ROWS = ["split.used.id", "split.used.len-written"]


def raised(test) -> Finding:
    with pytest.raises(Finding) as caught:
        test()
    return caught.value


# -- which row ---------------------------------------------------------------------------------


def test_the_row_named_last_wins_over_those_around_it() -> None:
    def test() -> None:
        with about("ring.loop"), preparing(), about("ring.moving"):
            require(False, "observed", row="vu.status")

    assert broken_row(raised(test), "call", ROWS) == "vu.status"


def test_the_innermost_row_around_counts_where_none_is_named() -> None:
    def test() -> None:
        with about("ring.loop"), about("ring.moving"), preparing():
            require(False, "observed")

    assert broken_row(raised(test), "call", ROWS) == "ring.moving"


def test_what_fails_while_preparing_accuses_nobody() -> None:
    def test() -> None:
        with preparing():
            require(False, "observed")

    assert broken_row(raised(test), "call", ROWS) == ""


@pytest.mark.parametrize(("when", "row"), [("setup", ""), ("call", ROWS[0]), ("teardown", "")])
def test_without_a_row_only_the_test_itself_accuses(when: str, row: str) -> None:
    assert broken_row(Finding("observed"), when, ROWS) == row


def test_an_error_of_the_suite_accuses_nobody() -> None:
    assert broken_row(KeyError("suite"), "call", ROWS) == ""


def test_a_crash_is_a_matter_of_robustness_not_of_the_row_at_hand() -> None:
    assert broken_row(Crash("SIGSEGV"), "call", ROWS) == "program.healthy"
    assert broken_row(Crash("SIGSEGV"), "teardown", ROWS) == "program.healthy"
    assert broken_row(Crash("SIGSEGV"), "call", ["ring.loop"]) == "ring.loop"


# -- from records to rows ----------------------------------------------------------------------


def status(row: str, *records: Record) -> str:
    run = Run("vhost-user", "balloon", "b", records=list(records))
    return next(v.status for v in verdicts(run) if v.row.id == row)


def record(outcome: str, broken: str = "") -> Record:
    return Record(f"test_a.py::test_{outcome}", outcome, requirements=ROWS, broken=broken)


def test_a_failing_test_condemns_the_row_that_it_found_broken_alone() -> None:
    failed = record("failed", ROWS[0])
    assert status(ROWS[0], failed) == "failed"
    assert status(ROWS[1], failed) == "not decided"
    assert status(ROWS[1], failed, record("passed")) == "passed"
    assert status(ROWS[1], record("inconclusive")) == "not decided"
    assert status(ROWS[1], record("n/a")) == "n/a"


def test_a_row_that_no_mark_names_can_be_found_broken() -> None:
    assert status("vu.header.reply", record("failed", "vu.header.reply")) == "failed"


@pytest.mark.parametrize(
    ("row", "word", "code"),
    [
        ("split.used.id", "failed", 1),
        ("vu.mq.offered", "warned", 0),
        ("ring.loop", "fragile", 3),
        ("balloon.inflate.frees", "advised", 0),
    ],
)
def test_each_strength_has_its_word_and_exit_status(row: str, word: str, code: int) -> None:
    run = Run("vhost-user", "balloon", "b", records=[record("failed", row)])
    assert status(row, *run.records) == word
    assert exit_status(run, verdicts(run)) == code


def test_open_questions_have_an_exit_status() -> None:
    run = Run("vhost-user", "balloon", "b", records=[record("inconclusive")])
    assert exit_status(run, verdicts(run)) == 4


def rows_of(spec: str) -> set[str]:
    """Return the rows that a run for a version of the virtio standard decides."""
    return {one.row.id for one in verdicts(Run("vfio-user", "balloon", "b", spec=spec))}


def test_rows_of_a_newer_standard_are_left_out() -> None:
    old, middle, new = rows_of("1.2"), rows_of("1.3"), rows_of("1.4")
    assert old < middle < new
    assert middle - old == {
        "basic.features.only-supported",
        "pci.common.admin-index",
        "pci.common.admin-num",
    }
    assert {name.rpartition(".")[0] for name in new - middle} == {"basic.suspend"}


def test_a_failure_of_a_newer_standard_breaks_no_older_one() -> None:
    failed = record("failed", "pci.common.admin-index")
    for spec, code in ("1.2", 0), ("1.3", 1):
        run = Run("vfio-user", "balloon", "b", records=[failed], spec=spec)
        assert exit_status(run, verdicts(run)) == code


# -- the catalogue -----------------------------------------------------------------------------


def test_every_row_says_where_it_comes_from() -> None:
    for chapter in chapters():
        for row in chapter.rows:
            ways = [bool(row.at), bool(row.quote), bool(row.ours), row.strength == "ROBUST"]
            assert sum(ways) == 1, row.id
            assert (row.strength == "OURS") == bool(row.ours), row.id
            assert not row.reading or row.quote, row.id


def test_rows_that_tests_name_are_in_the_catalogue() -> None:
    assert set(named_rows(SUITE)) <= set(by_id())
    assert set(marked_tests()) <= set(by_id())


def test_a_retired_id_is_not_used_again() -> None:
    assert not set(retired()) & set(by_id())


# -- numbering of a balloon --------------------------------------------------------------------


def test_queue_numbers_follow_the_scheme() -> None:
    features, offered = 0b101000, 0b111111  # hinting and reporting
    assert Numbering(("dense",)).numbers(features, offered) == {"hint": 2, "report": 3}
    assert Numbering(("fixed",)).numbers(features, offered) == {"hint": 3, "report": 4}
    assert Numbering(("offered",)).numbers(0b100000, 0b101000) == {"report": 3}
    assert set(SCHEMES) == {"dense", "fixed", "offered"}


# -- the command line --------------------------------------------------------------------------


def test_only_the_places_are_filled_in() -> None:
    text = """x '{"a": {socket}}' ${i} {dir}/{n} {other} {}"""
    assert fill(text, socket="S", dir="D", n=3) == """x '{"a": S}' ${i} D/3 {other} {}"""


def conform(*words: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "virtio_conformance.run"]
    return subprocess.run([*program, *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--spawn", "false {socket}"], "ended before it served"),
        (["--spawn", "no-such-program-at-all {socket}"], "cannot be started"),
        (["--vhost-user", "/nowhere/socket"], "no such socket"),
        (["--spawn", "sleep 30", "--before", "false", "--start-limit", "20"], "--before ends"),
    ],
)
def test_no_backend_is_one_line_and_status_2_at_once(words: list[str], told: str) -> None:
    begin = time.monotonic()
    done = conform(*words)
    assert done.returncode == 2
    assert told in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert time.monotonic() - begin < 15  # none of the limits, which are 10 s and more, was used


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--spawn", "unbalanced 'quote"],
        ["--spawn", "x", "--html", "/no/such/folder/report.html"],
        ["--spawn", "x", "--json", "/"],
        ["--spawn", "x", "--only", "test_nothing.py"],
        ["--spawn", "x", "--baseline", "/no/such/file"],
        ["--spawn", "x", "--device", "/no/such/file.py:Profile"],
        ["--vhost-user", "x", "--jobs", "2"],
    ],
    ids=str,
)
def test_a_wrong_command_line_is_told_before_anything_starts(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(words)
    assert end.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_profile_with_a_mistake_is_told_without_a_traceback(tmp_path: Path) -> None:
    wrong = tmp_path / "profile.py"
    wrong.write_text("class Broken(:\n")
    done = conform("--spawn", "x", "--device", f"{wrong}:Broken")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_socket_that_speaks_something_else_ends_the_run(tmp_path: Path) -> None:
    script = (
        "import socket,sys\nl=socket.socket(socket.AF_UNIX)\nl.bind(sys.argv[1])\nl.listen()\n"
        'while True:\n p=l.accept()[0]\n p.send(b\'{"QMP": {"version": 1}}\\n\'*10)\n p.recv(99)\n'
    )
    program = tmp_path / "qmp.py"
    program.write_text(script)
    done = conform("--spawn", f"{shlex.join([sys.executable, str(program)])} {{socket}}")
    assert done.returncode == 2
    assert "not vhost-user" in done.stdout


# -- baselines ---------------------------------------------------------------------------------


def a_run(*broken: tuple[str, str]) -> Run:
    records = [Record(test, "failed", broken=row) for row, test in broken]
    return Run("vhost-user", "balloon", "b", records=[*records, Record("test_ran", "passed")])


def test_a_baseline_shows_what_is_new_and_what_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    Baseline(failures(a_run(("ring.loop", "test_1"), ("ring.loop", "test_ran")))).save(path)
    now = a_run(("ring.loop", "test_1"), ("vu.status", "test_2"))
    difference = Baseline.load(path).compare(now)
    assert difference.known == {("ring.loop", "test_1")}
    assert difference.new == {("vu.status", "test_2")}
    assert difference.gone == {("ring.loop", "test_ran")}


def test_a_failure_whose_test_did_not_run_is_not_gone() -> None:
    known = Baseline(frozenset({("ring.loop", "test_left_out")}))
    assert not known.compare(a_run()).gone


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"baseline": 2}', '{"baseline":1,"known":[1]}'])
def test_a_file_that_is_no_baseline_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "known.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="no baseline"):
        Baseline.load(path)
