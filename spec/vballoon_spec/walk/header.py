# SPDX-License-Identifier: Apache-2.0
"""Generate the C header of the guest module from the declarations.

``python -m vballoon_spec.walk.header --write`` writes ``driver_kmod/vballoon_walk_wire.h``,
``--check`` fails if the file differs from the generated text.  The header is checked in, so
that the module builds without Python, and a unit test runs the check.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from enum import IntEnum, IntFlag
from pathlib import Path

from vballoon_spec.walk import formats
from virtio_formats.virtio import balloon
from virtio_formats.wire import WireStruct, c_struct

__all__ = ("DEFAULT_PATH", "generate", "main")

DEFAULT_PATH = Path(__file__).resolve().parents[3] / "driver_kmod" / "vballoon_walk_wire.h"
"""Path of the header in a checkout."""

_GUARD = "VBALLOON_WALK_WIRE_H"

_STRUCTS: tuple[tuple[type[WireStruct], str], ...] = (
    (balloon.BalloonConfig, "vballoon_config"),
    (balloon.BalloonStat, "vballoon_stat"),
    (formats.WalkHeader, "vballoon_walk_header"),
    (formats.WalkBegin, "vballoon_walk_begin"),
    (formats.WalkRange, "vballoon_walk_range"),
    (formats.WalkEnd, "vballoon_walk_end"),
    (formats.WalkMemmap, "vballoon_walk_memmap"),
    (formats.WalkMemmapRun, "vballoon_walk_memmap_run"),
)


def _define(name: str, value: int | str) -> str:
    return f"#define VBALLOON_{name} {value}"


def _numbers(prefix: str, members: Iterable[IntEnum]) -> Iterator[str]:
    for member in members:
        yield _define(f"{prefix}_{member.name}", member.value)


def _bits(prefix: str, members: Iterable[IntFlag]) -> Iterator[str]:
    """Return the flags as bit numbers, for the kernel's feature tables and ``BIT()``."""
    for member in members:
        yield _define(f"{prefix}_{member.name}", member.value.bit_length() - 1)


def _constants() -> Iterator[str]:
    yield "/* Feature bits, by number */"
    yield from _bits("F", balloon.BalloonFeature)
    yield ""
    yield "/* Command ids of hinting and of the walk */"
    for name in ("STOP", "DONE", "FIRST"):
        yield _define(f"CMD_ID_{name}", getattr(balloon, f"CMD_ID_{name}"))
    yield _define("PFN_SHIFT", balloon.PFN_SHIFT)
    yield ""
    yield "/* Tags of memory statistics */"
    yield from _numbers("S", balloon.StatTag)
    yield _define("S_NR", len(balloon.StatTag))
    yield ""
    yield "/* The walk queue: fixed number, largest buffer, types of buffers, flags (by number) */"
    yield _define("WALK_VQ", formats.WALK_VQ)
    yield _define("WALK_BUFFER_MAX", formats.BUFFER_MAX)
    yield from _numbers("WALK", formats.WalkType)
    yield from _bits("WALK_END_F", formats.WalkEndFlag)
    yield from _bits("WALK_MEMMAP_F", formats.WalkMemmapFlag)


def _summary(cls: type[WireStruct]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0].replace("``", "").rstrip(".:")


def _struct(cls: type[WireStruct], name: str) -> Iterator[str]:
    yield f"/* {_summary(cls)} */"
    yield c_struct(cls, name).rstrip("\n")
    yield f"static_assert(sizeof(struct {name}) == {cls.SIZE});"
    yield ""


def generate() -> str:
    """Return the text of the header."""
    lines = [
        "/* SPDX-License-Identifier: GPL-2.0-only */",
        "/*",
        " * Wire formats of the balloon device and of its walk queue.",
        " *",
        " * Generated from spec/vballoon_spec by `python -m vballoon_spec.walk.header --write`;",
        " * change the declarations there, not this file.",
        " */",
        f"#ifndef {_GUARD}",
        f"#define {_GUARD}",
        "",
        "#include <linux/build_bug.h>",
        "#include <linux/compiler.h>",
        "#include <linux/types.h>",
        "",
        *_constants(),
        "",
    ]
    for cls, name in _STRUCTS:
        lines += _struct(cls, name)
    lines.append(f"#endif /* {_GUARD} */")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command.  Return 1 if ``--check`` finds a difference, else 0."""
    parser = argparse.ArgumentParser(prog="vballoon_spec.walk.header", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare only")
    action.add_argument("--write", action="store_true", help="write the header")
    parser.add_argument("path", nargs="?", type=Path, default=DEFAULT_PATH)
    options = parser.parse_args(arguments)
    text = generate()
    if options.write:
        options.path.write_text(text)
        return 0
    if options.path.is_file() and options.path.read_text() == text:
        return 0
    print(f"{options.path}: differs from the declarations; run with --write", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
