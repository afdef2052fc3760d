# SPDX-License-Identifier: Apache-2.0
"""vballoon.skipmap.export: what is written can be trusted, what is damaged is refused."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
from tests.fakes.memory import make_memory
from tests.unit.test_skipmap_map import MIB, begun, put

from vballoon.errors import UsageError
from vballoon.memory import PageRanges
from vballoon.skipmap import (
    PageBitmap,
    Provenance,
    RoundKind,
    SkipExport,
    SkipMap,
    VoidReason,
    write_export,
)
from vballoon.skipmap.export import read_bitmap
from vballoon_spec.skipmap import Manifest, ManifestError
from virtio_formats.virtio.balloon import BalloonFeature

B, R, H, W = Provenance


@pytest.fixture
def skipmap():
    memory = make_memory((0, 4 * MIB), (1 << 32, 2 * MIB))
    skipmap = SkipMap(memory)
    yield skipmap
    skipmap.close()
    for region in memory.regions:
        region.close()


@pytest.fixture
def filled(skipmap):
    """Return a map with bits of every provenance and both rounds complete."""
    for kind, number in ((RoundKind.HINT, 5), (RoundKind.WALK, 6)):
        begun(skipmap, kind, number)
    put(skipmap, B, (0, 10), (100, 103))
    put(skipmap, R, (200, 300))
    put(skipmap, H, (500, 900), (1 << 20, (1 << 20) + 65))
    put(skipmap, W, (1 << 20, (1 << 20) + 512))
    for round_ in skipmap.rounds.values():
        round_.end()
    return skipmap


def test_what_was_written_is_read(filled, tmp_path):
    filled.memory.regions[0].view[250 * 4096] = 1  # taken back after it was reported
    write_export(filled, tmp_path / "out")
    export = SkipExport(tmp_path / "out")
    assert export.provenances == tuple(Provenance)
    for provenance in (B, H, W):
        assert export.bitmap(provenance).extents().tolist() == filled.extents(provenance).tolist()
    assert export.bitmap(R).extents().tolist() == [[200, 250], [251, 300]]
    assert export.round_of(H).round == 5
    assert export.round_of(W).published == (
        filled.rounds[RoundKind.WALK].published.monotonic_ns,
        filled.rounds[RoundKind.WALK].published.wall_ns,
    )
    assert export.verify() == {B: 13, R: 99, H: 465, W: 512}


def test_the_files_are_what_the_format_says(filled, tmp_path):
    """Read without this package: KVM_GET_DIRTY_LOG words, sizes, checksums, counts."""
    write_export(filled, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["format"] == "vballoon-skip-bitmap"
    assert (manifest["version"], manifest["page_size"]) == (1, 4096)
    assert [(r["guest_phys_addr"], r["size"], r["file_offset"]) for r in manifest["regions"]] == [
        (0, 4 * MIB, 0),
        (1 << 32, 2 * MIB, 4 * MIB),
    ]
    for region in manifest["regions"]:
        assert set(region["bitmaps"]) == {"ballooned", "reported", "hinted", "walked"}
        for entry in region["bitmaps"].values():
            data = (tmp_path / "out" / entry["file"]).read_bytes()
            assert len(data) == entry["bytes"] == region["size"] // 4096 // 8
            assert hashlib.sha256(data).hexdigest() == entry["sha256"]
            assert int.from_bytes(data, "little").bit_count() == entry["pages"]
    data = (tmp_path / "out" / "hinted-1.bitmap").read_bytes()
    assert int.from_bytes(data, "little") == (1 << 65) - 1
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700, "others may read the bits"


def test_an_export_is_of_one_moment(filled, tmp_path):
    from vballoon.skipmap import FrozenExport

    frozen = FrozenExport(filled)
    filled.void(VoidReason.RESET)
    frozen.write(tmp_path / "out")
    assert SkipExport(tmp_path / "out").bitmap(W).count() == 512


@pytest.mark.parametrize("where", ["not empty", "a file", "not a directory"])
def test_nothing_is_overwritten_and_nothing_left_behind(filled, tmp_path, where):
    target = tmp_path / "out"
    if where == "not empty":
        target.mkdir()
        (target / "precious").touch()
    elif where == "a file":
        target.touch()
    else:
        (tmp_path / "file").touch()
        target = tmp_path / "file" / "out"
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UsageError, match="cannot export to"):
        write_export(filled, target)
    assert sorted(os.listdir(tmp_path)) == before


def test_an_empty_directory_will_do(filled, tmp_path):
    (tmp_path / "out").mkdir()
    write_export(filled, tmp_path / "out")
    SkipExport(tmp_path / "out").verify()


# the verdict on rounds


@pytest.mark.parametrize("fate", ["running", "incomplete", "void", "no round"])
def test_bits_of_a_bad_round_are_refused(skipmap, tmp_path, fate):
    if fate != "no round":
        round_ = begun(skipmap)
    if fate == "void":
        round_.void("the device was reset")
    put(skipmap, H, (0, 10))
    if fate == "incomplete":
        round_.record(1, 10, bad=1)
        round_.end()
    write_export(skipmap, tmp_path / "out")
    export = SkipExport(tmp_path / "out")
    with pytest.raises(
        UsageError,
        match={"no round": "no round", "void": "void: the device"}.get(fate, "incomplete"),
    ):
        export.bitmap(H)
    told = SkipExport(
        tmp_path / "out",
        accept_incomplete=fate in ("running", "incomplete"),
        accept_void=fate in ("void", "no round"),
    )
    assert told.bitmap(H).count() == 10
    wrong = SkipExport(
        tmp_path / "out",
        accept_incomplete=fate in ("void", "no round"),
        accept_void=fate in ("running", "incomplete"),
    )
    with pytest.raises(UsageError):
        wrong.bitmap(H)


def test_skippable_follows_the_safety_rule(filled, tmp_path):
    write_export(filled, tmp_path / "out")
    export = SkipExport(tmp_path / "out")
    untracked = export.skippable(None)
    assert untracked.extents().tolist() == [[0, 10], [100, 103], [200, 300]], "no hearsay"
    written = PageBitmap(export.layout)
    written.set_ranges(PageRanges([0, 600, 1 << 20], [1, 700, (1 << 20) + 1]))
    assert export.skippable(written).extents().tolist() == [
        [1, 10],
        [100, 103],
        [200, 300],
        [500, 600],
        [700, 900],
        [(1 << 20) + 1, (1 << 20) + 512],
    ]


@pytest.mark.parametrize(("poison", "safe"), [(None, True), (0, True), (0xAAAAAAAA, False)])
def test_poison_makes_free_pages_unskippable_unless_filled(filled, tmp_path, poison, safe):
    filled.poison = poison
    write_export(filled, tmp_path / "out")
    export = SkipExport(tmp_path / "out")
    nothing_written = PageBitmap(export.layout)
    free = 400 + 512
    assert export.skippable(nothing_written).count() == 113 + free * safe
    assert export.skippable(nothing_written, fills_poison=True).count() == 113 + free


# damage


def damage_bit(directory):
    path = directory / "hinted-0.bitmap"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def damage_manifest(directory, change):
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def resize(directory, size):
    os.truncate(directory / "walked-1.bitmap", size)


def lie_about_pages(manifest):
    manifest["regions"][0]["bitmaps"]["hinted"]["pages"] += 1
    manifest["pages"]["hinted"] += 1


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_bit, "checksum"),
        (lambda d: resize(d, 0), "0 bytes where 64"),
        (lambda d: resize(d, 72), "72 bytes where 64"),
        (lambda d: (d / "walked-0.bitmap").unlink(), "No such file"),
        (lambda d: damage_manifest(d, lie_about_pages), "pages that the manifest names"),
        (lambda d: (d / "manifest.json").unlink(), "No such file"),
        (lambda d: (d / "manifest.json").write_text("{"), "not JSON"),
        (lambda d: (d / "manifest.json").write_text("[" * 100_000), "not JSON"),
        (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe{}"), "manifest.json"),
    ],
)
def test_damage_is_found(filled, tmp_path, damage, says):
    write_export(filled, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(UsageError, match=says):
        SkipExport(tmp_path / "out").verify()


def enlarge(manifest):
    """Enlarge the last region to an exabyte, for which no bitmap exists."""
    region = manifest["regions"][-1]
    region["size"] = 1 << 60
    for bitmap in region["bitmaps"].values():
        bitmap["bytes"] = region["size"] // 4096 // 8


def test_guest_larger_than_all_memory_is_an_error_and_no_crash(filled, tmp_path):
    write_export(filled, tmp_path / "out")
    damage_manifest(tmp_path / "out", enlarge)
    with pytest.raises(UsageError, match="larger than this machine"):
        SkipExport(tmp_path / "out").verify()
    huge = tmp_path / "huge.bitmap"
    huge.touch()
    os.truncate(huge, 1 << 43)
    with pytest.raises(UsageError, match="larger than this machine"):
        read_bitmap(huge, 1 << 46)


def test_bits_behind_the_last_page_are_refused(tmp_path):
    np.array([2**63], dtype=np.uint64).tofile(tmp_path / "raw")
    assert read_bitmap(tmp_path / "raw", 64).size == 1
    with pytest.raises(UsageError, match="after the last page"):
        read_bitmap(tmp_path / "raw", 63)


def entry(m):
    return m["regions"][0]["bitmaps"]["walked"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: m.update(format="other"), "format"),
        (lambda m: m.update(version=2), "version: 2 is unknown"),
        (lambda m: m.update(version=True), "version"),
        (lambda m: m.pop("version"), "version"),
        (lambda m: m.update(page_size=65536), "page_size"),
        (lambda m: m.update(regions={}), "regions"),
        (lambda m: m.update(regions=[3]), r"regions\[0\]"),
        (lambda m: m.update(created=[1]), "created"),
        (lambda m: m.update(poison="0"), "poison"),
        (lambda m: m["pages"].update(walked=0), "pages.walked: not the sum"),
        (lambda m: m["regions"][0].update(size=-1), r"regions\[0\].size"),
        (lambda m: m["regions"][0].update(size=1 << 64), r"regions\[0\].size"),
        (lambda m: m["regions"][0].update(guest_phys_addr=5), "guest_phys_addr"),
        (lambda m: m["regions"][1].update(guest_phys_addr=0), "overlaps|out of range"),
        (lambda m: entry(m).update(file="../../etc/passwd"), "not a plain file name"),
        (lambda m: entry(m).update(file=".."), "not a plain file name"),
        (lambda m: entry(m).update(bytes=8), r"regions\[0\].bitmaps.walked.bytes"),
        (lambda m: entry(m).update(sha256="x"), "sha256"),
        (lambda m: entry(m).update(pages=2000), "pages"),
        (lambda m: m["rounds"][0].update(kind="guess"), r"rounds\[0\].kind"),
        (lambda m: m["rounds"][0].update(complete=1), r"rounds\[0\].complete"),
        (lambda m: m["rounds"][0].update(published=None), "published"),
    ],
)
def test_a_manifest_with_a_wrong_field_is_refused_by_name(filled, tmp_path, change, field):
    write_export(filled, tmp_path / "out")
    text = (tmp_path / "out" / "manifest.json").read_text()
    manifest = json.loads(text)
    change(manifest)
    with pytest.raises(ManifestError, match=field):
        Manifest.loads(json.dumps(manifest))
    assert Manifest.loads(text).dumps() == text
    extended = json.loads(text) | {"a later key": 1}
    assert Manifest.loads(json.dumps(extended)).dumps() == text


@pytest.mark.parametrize("negotiated", [True, False])
def test_the_map_knows_the_value_that_the_driver_wrote(negotiated):
    from tests.fakes.rig import Rig

    rig = Rig()
    rig.balloon.stop()
    rig.balloon.write_config(12, b"\xaa\xbb\xcc\xdd")
    if not negotiated:
        rig.features &= ~int(BalloonFeature.PAGE_POISON)
    rig.balloon.start()
    assert rig.balloon.skipmap.poison == (0xDDCCBBAA if negotiated else None)
