# SPDX-License-Identifier: Apache-2.0
"""What a balloon does that no standard settles; tried once, before the tests.

Does it free pages at all?  Which numbers do its optional queues have?  Tests whose rows do not
depend on the answers ask here, so that a back-end that answers otherwise is not accused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from virtio_conformance.findings import Finding, NotStarted
from virtio_conformance.memory import PAGE
from virtio_conformance.numbering import Numbering, find_numbering
from virtio_conformance.profiles import Exchange, Profile, find_profile
from virtio_conformance.rig import Rig
from virtio_conformance.rig_vfio_user import VfioUserRig
from virtio_conformance.rig_vhost_user import VhostUserRig
from virtio_conformance.target import Options, Target
from virtio_formats.virtio.balloon import BalloonPfn

__all__ = ("Learned", "learn", "rig_kind")


@dataclass(frozen=True)
class Learned:
    """What was found out."""

    frees: bool = True
    """Whether an inflated page becomes a hole; true for devices that are no balloon."""
    numbering: Numbering = field(default_factory=Numbering)


def rig_kind(options: Options) -> type[Rig]:
    """Return the class of rigs for the protocol under test."""
    return VfioUserRig if options.protocol == "vfio-user" else VhostUserRig


@cache
def learn(options: Options) -> Learned:
    """Return what the back-end does; the standard's answer for whatever does not show."""
    profile = find_profile(options.device)()
    if profile.name != "balloon":
        return Learned()
    with _rigs(options, profile) as new_rig:
        try:
            frees = options.discards and _frees(new_rig())
            return Learned(frees, find_numbering(new_rig))
        except (Finding, NotStarted, OSError):
            return Learned(frees=False)


class _Maker:
    """Makes rigs; starts the program again where it serves a single connection."""

    def __init__(self, options: Options, profile: Profile) -> None:
        self.options, self.profile = options, profile
        self.target: Target | None = None
        self.made: list[Rig] = []

    def __call__(self) -> Rig:
        for rig in self.made:
            with contextlib.suppress(OSError, Finding):
                rig.close()
        self.made.clear()
        if self.target is not None and (self.target.ends_after_a_connection() or self.target.gone):
            self.target.stop()
            self.target = None
        self.target = self.target or Target(self.options)
        self.made.append(rig_kind(self.options)(self.target, self.profile))
        return self.made[-1]

    def close(self) -> None:
        """Leave, and end the program if it was started here."""
        for rig in self.made:
            rig.close()
        if self.target is not None:
            self.target.stop()


@contextlib.contextmanager
def _rigs(options: Options, profile: Profile) -> Iterator[_Maker]:
    maker = _Maker(options, profile)
    try:
        yield maker
    finally:
        maker.close()


def _frees(rig: Rig) -> bool:
    """Return whether one inflated page is a hole when it is acknowledged."""
    rig.bring_up()
    page = rig.ram.alloc(PAGE, PAGE, 1)
    rig.submit(rig.place(Exchange(BalloonPfn(pfn=page // PAGE).build())))
    rig.main.publish()
    rig.kick(rig.profile.main)
    rig.collect(rig.main, 1)
    return rig.ram.is_hole(page)
