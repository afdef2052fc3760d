# SPDX-License-Identifier: Apache-2.0
"""The guest module's C header is what the declarations say, and says it in C."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vballoon_spec.walk import formats, header
from virtio_formats.virtio.balloon import BalloonConfig, BalloonFeature, StatTag


def test_the_checked_in_header_is_current() -> None:
    assert header.main(["--check"]) == 0


@pytest.mark.parametrize("edit", ["value", "missing"])
def test_a_stale_header_is_found(tmp_path: Path, edit: str) -> None:
    path = tmp_path / "wire.h"
    if edit == "value":
        text = header.generate()
        stale = text.replace("VBALLOON_WALK_END 3", "VBALLOON_WALK_END 4")
        assert stale != text
        path.write_text(stale)
    assert header.main(["--check", str(path)]) == 1
    assert header.main(["--write", str(path)]) == 0
    assert header.main(["--check", str(path)]) == 0


def _defines() -> dict[str, int]:
    found = re.findall(r"^#define VBALLOON_(\w+) (\d+)$", header.generate(), re.MULTILINE)
    return {name: int(value) for name, value in found}


def test_features_are_bit_numbers() -> None:
    defines = _defines()
    assert defines["F_FREE_PAGE_WALK"] == 63
    for feature in BalloonFeature:
        assert 1 << defines[f"F_{feature.name}"] == feature


def test_types_tags_and_flags_are_all_there() -> None:
    defines = _defines()
    for kind in formats.WalkType:
        assert defines[f"WALK_{kind.name}"] == kind
    for tag in StatTag:
        assert defines[f"S_{tag.name}"] == tag
    assert defines["S_NR"] == len(StatTag)
    assert 1 << defines["WALK_END_F_CUT"] == formats.WalkEndFlag.CUT
    assert 1 << defines["WALK_MEMMAP_F_PARTIAL"] == formats.WalkMemmapFlag.PARTIAL


def test_sizes_are_asserted_in_c() -> None:
    text = header.generate()
    asserted = dict(re.findall(r"static_assert\(sizeof\(struct (\w+)\) == (\d+)\);", text))
    assert int(asserted["vballoon_config"]) == BalloonConfig.SIZE
    assert set(asserted) == set(re.findall(r"^struct (\w+) \{", text, re.MULTILINE))


def test_the_path_is_the_module_of_this_checkout() -> None:
    assert header.DEFAULT_PATH.parent.name == "driver_kmod"
    assert (header.DEFAULT_PATH.parent / "Kbuild").is_file()
