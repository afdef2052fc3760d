# SPDX-License-Identifier: Apache-2.0
"""The catalogue is complete, consistent with the sources' index, and with the tests' marks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from virtio_conformance.requirements import STRENGTHS, by_id, chapters, gaps, index
from virtio_conformance.requirements.marks import marked_tests
from virtio_conformance.requirements.sources import html_blocks, virtio_blocks

CHAPTERS = {chapter.name: chapter for chapter in chapters()}

TEX = r"""
\section{Rings}\label{sec:Rings}
The driver MUST not count here.
\devicenormative{\subsection}{Rings}{Basic / Rings}
A device MUST answer, and it SHOULD
NOT be late. It MAY rest.
\drivernormative{\subsection}{Rings}{Basic / Rings}
A driver MUST ask.
\label{devicenormative:Basic / Legacy
Rings}
Devices SHOULD fail.
"""
PAGE = """<h2>Rings</h2><p>It must turn. It must
not stop.</p><dl><dt>VHOST_USER_X (old name)</dt><dd><p>The back-end should reply.</p></dd></dl>
<h3>VFIO_USER_Y</h3><h4>Reply</h4><p>It shall be short.</p>"""


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_statement_of_the_sources_is_accounted_for_once(name: str) -> None:
    assert gaps(CHAPTERS[name]) == []


def test_a_missing_row_and_a_wrong_strength_are_seen() -> None:
    chapter = CHAPTERS["virtio_split"]
    first, *rest = chapter.rows
    assert gaps(replace(chapter, rows=tuple(rest))) == [f"{first.label} #{first.at}: missing"]
    softer = replace(first, strength="SHOULD")
    assert gaps(replace(chapter, rows=(softer, *rest))) == [
        f"{first.id}: SHOULD here, MUST NOT in the sources"
    ]


def test_rows_have_a_test_or_a_reason_never_both() -> None:
    wrong = [row.id for row in by_id().values() if bool(row.tests) == bool(row.untestable)]
    assert wrong == []


def test_tests_named_in_the_catalogue_are_those_that_carry_the_mark() -> None:
    listed = {row.id: list(row.tests) for row in by_id().values() if row.tests}
    assert listed == marked_tests()


def test_rows_are_well_formed() -> None:
    for row in by_id().values():
        assert row.strength in STRENGTHS
        assert row.text.endswith("."), row.id
        assert row.label
        assert row.since in ("", "1.3", "1.4"), row.id
        assert row.at > 0 or row.chapter in ("robustness", *index()), row.id


def test_blocks_of_a_tex_source() -> None:
    blocks = virtio_blocks(TEX)
    assert [(b.label, b.strengths) for b in blocks] == [
        ("Basic / Rings", ("MUST", "SHOULD NOT", "MAY")),
        ("Basic / Legacy Rings", ("SHOULD",)),
    ]
    rewrapped = TEX.replace("SHOULD\nNOT", "SHOULD NOT")
    assert [b.sha256 for b in virtio_blocks(rewrapped)] == [b.sha256 for b in blocks]
    changed = TEX.replace("be late", "be early")
    assert virtio_blocks(changed)[0].sha256 != blocks[0].sha256


def test_blocks_of_a_manual_page() -> None:
    assert [(b.label, b.strengths) for b in html_blocks(PAGE)] == [
        ("Rings", ("MUST", "MUST NOT")),
        ("VHOST_USER_X", ("SHOULD",)),
        ("VFIO_USER_Y / Reply", ("MUST",)),
    ]
