# SPDX-License-Identifier: Apache-2.0
"""The skip bitmap's formats: the export directory and the live descriptor (see ``README.md``)."""

from __future__ import annotations

from vballoon_spec.skipmap.live import LIVE_MAGIC, LIVE_VERSION, LiveHeader, LiveRoundState
from vballoon_spec.skipmap.manifest import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST_FILE,
    PAGE_SIZE,
    PROVENANCES,
    BitmapFile,
    Manifest,
    ManifestError,
    ManifestRegion,
    ManifestRound,
    page_sums,
)

__all__ = (
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "LIVE_MAGIC",
    "LIVE_VERSION",
    "MANIFEST_FILE",
    "PAGE_SIZE",
    "PROVENANCES",
    "BitmapFile",
    "LiveHeader",
    "LiveRoundState",
    "Manifest",
    "ManifestError",
    "ManifestRegion",
    "ManifestRound",
    "page_sums",
)
