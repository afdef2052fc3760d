# SPDX-License-Identifier: Apache-2.0
"""Count the statements in the sources of the specifications; write (or check) ``index.json``.

Run it on a checkout of the virtio specification and on QEMU's interop manual (Debian's
``qemu-system-data`` has it)::

    python -m virtio_conformance.requirements.count --virtio virtio-spec \\
        --interop /usr/share/doc/qemu-system-common/interop [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from virtio_conformance.requirements import chapters
from virtio_conformance.requirements.sources import (
    VIRTIO_FILES,
    Block,
    plain_html,
    plain_tex,
    read_blocks,
)

INTEROP_FILES = {"vhost_user": "vhost-user.html", "vfio_user": "vfio-user.html"}
HERE = Path(__file__).parent / "index.json"


def build(virtio: Path, interop: Path) -> dict[str, Any]:
    """Return the index of these sources.  Raise ValueError for a label used twice in one file."""
    folders = {**dict.fromkeys(VIRTIO_FILES, virtio), **dict.fromkeys(INTEROP_FILES, interop)}
    chapters = {
        name: _entries(read_blocks(folders[name] / file))
        for name, file in {**VIRTIO_FILES, **INTEROP_FILES}.items()
    }
    revisions = {"virtio": _git_revision(virtio), "qemu": _manual_version(interop)}
    return {"revisions": revisions, "chapters": chapters}


def _entries(blocks: Sequence[Block]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for block in blocks:
        if block.label in found:
            raise ValueError(f"label {block.label!r} twice")
        found[block.label] = {
            "strengths": list(block.strengths),
            "sha256": block.sha256,
            "line": block.line,
        }
    return found


def _git_revision(checkout: Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def _manual_version(interop: Path) -> str:
    page = (interop / "vhost-user.html").read_text(encoding="utf-8")
    found = re.search(r"documentation is for QEMU version ([\d.]+\d)", page)
    return found[1] if found else "unknown"


def lost_quotes(virtio: Path, interop: Path) -> list[str]:
    """Return the rows whose quote is not in the sources of their specification."""
    texts = {
        "virtio": "".join(plain_tex((virtio / f).read_text("utf-8")) for f in VIRTIO_FILES.values())
    }
    for name, file in INTEROP_FILES.items():
        texts[name] = plain_html((interop / file).read_text("utf-8"))
    return [
        row.id
        for chapter in chapters()
        for row in chapter.rows
        if row.quote and row.quote not in texts.get(chapter.name, texts["virtio"])
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the index, or with ``--check`` say whether the stored one still fits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--virtio", type=Path, required=True, help="checkout of virtio-spec")
    parser.add_argument("--interop", type=Path, required=True, help="QEMU's interop HTML pages")
    parser.add_argument("--revision", help="virtio revision, where the checkout has no .git")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args(argv)
    built = build(args.virtio, args.interop)
    if args.revision:
        built["revisions"]["virtio"] = args.revision
    text = json.dumps(built, indent=1, ensure_ascii=False) + "\n"
    total = sum(len(b["strengths"]) for c in built["chapters"].values() for b in c.values())
    print(f"{total} statements in {sum(map(len, built['chapters'].values()))} blocks")
    if not args.check:
        HERE.write_text(text, encoding="utf-8")
        return 0
    missing = lost_quotes(args.virtio, args.interop)
    for row in missing:
        print(f"{row}: its quote is not in these sources")
    same = json.loads(HERE.read_text(encoding="utf-8"))["chapters"] == built["chapters"]
    print("the index fits these sources" if same else "the index is of other sources")
    return 0 if same and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
