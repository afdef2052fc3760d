# SPDX-License-Identifier: Apache-2.0
"""The memory balloon itself: features, configuration space, queues, rounds.  No transport words."""

from __future__ import annotations

from vballoon.balloon.config import ConfigSpace
from vballoon.balloon.counters import Counters
from vballoon.balloon.device import Balloon
from vballoon.balloon.roles import Role, settle_roles
from vballoon.balloon.stats import GuestStats

__all__ = ("Balloon", "ConfigSpace", "Counters", "GuestStats", "Role", "settle_roles")
