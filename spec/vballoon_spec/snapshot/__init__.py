# SPDX-License-Identifier: Apache-2.0
"""Formats of a snapshot: a directory, and the same content as a stream (see ``README.md``)."""

from __future__ import annotations

from vballoon_spec.snapshot.manifest import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST_FILE,
    STATE_FILE,
    MemoryFile,
    SnapshotManifest,
    SnapshotManifestError,
    StateFile,
    StateKind,
)
from vballoon_spec.snapshot.stream import MOVE_MAGIC, STREAM_MAGIC, Frame, FrameKind

__all__ = (
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "MOVE_MAGIC",
    "STATE_FILE",
    "STREAM_MAGIC",
    "Frame",
    "FrameKind",
    "MemoryFile",
    "SnapshotManifest",
    "SnapshotManifestError",
    "StateFile",
    "StateKind",
)
