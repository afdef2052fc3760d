# SPDX-License-Identifier: Apache-2.0
"""What the balloon has done and seen since it was made; shown by ``query-status``."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ("Counters",)


@dataclass(slots=True)
class Counters:
    """Running totals.  Pages are of 4 KiB, bytes are bytes; ``bad_*`` count what was ignored."""

    inflated_pages: int = 0
    deflated_pages: int = 0
    reported_pages: int = 0
    reports_kept: int = 0
    """Reported buffers acknowledged without a discard (poison, or discarding is off)."""
    hinted_pages: int = 0
    hints_stale_pages: int = 0
    """Pages hinted outside a round or under another command id: ignored, as the standard says."""
    walked_ranges: int = 0
    walked_pages: int = 0
    discarded_bytes: int = 0
    stats_buffers: int = 0
    stats_unknown_tags: int = 0
    bad_inflate: int = 0
    """Page numbers outside guest memory, and surplus bytes of odd-sized buffers."""
    bad_report: int = 0
    bad_hint: int = 0
    bad_stats: int = 0
    bad_walk: int = 0
