# SPDX-License-Identifier: Apache-2.0
"""The import packages of the four distributions and their folders."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGES = {
    "virtio_formats": REPOSITORY / "spec/virtio-formats",
    "virtio_conformance": REPOSITORY / "spec/virtio-conformance",
    "vballoon_spec": REPOSITORY / "spec",
    "fdsocket": REPOSITORY / "device/vfio-user",
    "vfio_user": REPOSITORY / "device/vfio-user",
    "vballoon": REPOSITORY / "device",
}
"""Import package to its folder on the import path."""
SOURCE_ROOTS = tuple(dict.fromkeys(PACKAGES.values()))
SUITE = PACKAGES["virtio_conformance"] / "virtio_conformance/suite"


def modules() -> dict[str, Path]:
    """Return the file of each module of all packages, by its dotted name."""
    found = {}
    for package, root in PACKAGES.items():
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def import_path(device: Path = REPOSITORY / "device") -> str:
    """Return a PYTHONPATH of all source roots, with *device* in place of ``device/``."""
    at_home = REPOSITORY / "device"
    return ":".join(
        str(device / root.relative_to(at_home) if root.is_relative_to(at_home) else root)
        for root in SOURCE_ROOTS
    )
