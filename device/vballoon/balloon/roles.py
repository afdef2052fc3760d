# SPDX-License-Identifier: Apache-2.0
"""Which queue does what: the one place that knows the two numberings in use.

The standard fixes statsq 2, free_page_vq 3 and reporting_vq 4 (*Memory Balloon Device /
Virtqueues*).  Linux leaves no gaps: it numbers the queues of the *negotiated* features densely
from 2 on.  Neither numbering is announced, so the rings that the driver has set up decide.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from vballoon_spec.virtio.balloon import BalloonFeature

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ("NUM_QUEUES", "Role", "settle_roles")

NUM_QUEUES = 6
"""Five of the standard and the walk queue, which has the fixed number 5."""


class Role(StrEnum):
    """What a queue is for; the names are the standard's, and the walk extension's."""

    INFLATE = "inflateq"
    DEFLATE = "deflateq"
    STATS = "statsq"
    HINT = "free_page_vq"
    REPORT = "reporting_vq"
    WALK = "walk_vq"


_FIXED = (
    (2, BalloonFeature.STATS_VQ, Role.STATS),
    (3, BalloonFeature.FREE_PAGE_HINT, Role.HINT),
    (4, BalloonFeature.PAGE_REPORTING, Role.REPORT),
    (5, BalloonFeature.FREE_PAGE_WALK, Role.WALK),
)


def settle_roles(features: int, present: Collection[int]) -> dict[int, Role]:
    """Queue index → role, for negotiated *features* and the indices of the rings set up.

    Fixed numbering is taken where exactly its rings are there (or, with a ring missing, where a
    ring exists that only it explains); dense numbering otherwise.
    """
    roles = {0: Role.INFLATE, 1: Role.DEFLATE}
    wanted = [(index, role) for index, mask, role in _FIXED if features & mask]
    dense = dict(enumerate((role for _, role in wanted), start=2))
    fixed = dict(wanted)
    optional = {index for index in present if index >= 2}
    only_fixed_explains = bool(optional) and optional <= set(fixed) and not optional <= set(dense)
    return roles | (fixed if only_fixed_explains or optional == set(fixed) else dense)
