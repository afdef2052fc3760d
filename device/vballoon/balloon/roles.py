# SPDX-License-Identifier: Apache-2.0
"""Which queue does what: the one place that knows the two numberings in use.

The standard fixes statsq 2, free_page_vq 3 and reporting_vq 4 (*Memory Balloon Device /
Virtqueues*).  Linux leaves no gaps: it numbers the queues of the *negotiated* features densely
from 2 on.  Neither numbering is announced, so the rings that the driver has set up decide.  They
may come one after the other, and taking one for another in the meantime could lose a page: a page
that is hinted must not be discarded, one that is reported is.  So a ring whose role depends on
rings that are still to come has none yet.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from virtio_formats.virtio.balloon import BalloonFeature

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ("NUM_QUEUES", "Role", "numberings", "settle_roles")

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


def numberings(features: int) -> tuple[dict[int, Role], dict[int, Role]]:
    """Return the roles of the optional queues for *features*, in dense and in fixed numbering."""
    wanted = [(index, role) for index, mask, role in _FIXED if features & mask]
    return dict(enumerate((role for _, role in wanted), start=2)), dict(wanted)


def settle_roles(features: int, present: Collection[int]) -> dict[int, Role]:
    """Queue index → role, for negotiated *features* and the indices of the rings set up.

    A numbering whose rings are all there is the one.  While rings are missing: the only one that
    explains those that are there, or what both say of them.  Rings that neither explains (set up
    by a front-end, used by nobody) leave dense numbering, which is Linux's.
    """
    optional = {index for index in present if index >= 2}
    dense, fixed = numberings(features)
    roles = {0: Role.INFLATE, 1: Role.DEFLATE}
    if optional in (dense.keys(), fixed.keys()):
        return roles | (dense if optional == dense.keys() else fixed)
    if not optional <= fixed.keys():
        return roles | dense
    if not optional <= dense.keys():
        return roles | fixed
    return roles | {i: dense[i] for i in optional if dense[i] is fixed[i]}
