# SPDX-License-Identifier: Apache-2.0
"""Feature bits by name, as an operator writes them."""

from __future__ import annotations

from typing import NamedTuple

from vballoon import vhost_user, virtio_pci
from vballoon.balloon.device import ALL_FEATURES
from vballoon.errors import UsageError
from virtio_formats.virtio import features as ring
from virtio_formats.virtio.balloon import BalloonFeature

__all__ = ("Offered", "device_names", "parse_features")

_PREFIXES = ("VIRTIO_BALLOON_F_", "VIRTIO_F_")
_RING = {
    "INDIRECT_DESC": ring.VIRTIO_F_INDIRECT_DESC,
    "EVENT_IDX": ring.VIRTIO_F_EVENT_IDX,
    "RING_PACKED": ring.VIRTIO_F_RING_PACKED,
    "IN_ORDER": ring.VIRTIO_F_IN_ORDER,
}
"""Optional ring features; VERSION_1 is always offered."""


class Offered(NamedTuple):
    """Feature words: those of the balloon, and ring and transport features for each transport."""

    device: int
    ring: int
    pci_ring: int


def device_names() -> dict[int, str]:
    """Return the balloon's feature bits: number → the standard's name."""
    return {f.bit_length() - 1: f"VIRTIO_BALLOON_F_{f.name}" for f in BalloonFeature}


def parse_features(text: str) -> Offered:
    """Return the feature words to offer for *text* (see ``vballoon serve --help``).

    Raise UsageError for an unknown name, and for FREE_PAGE_WALK without PAGE_POISON [WALK-D16].
    """
    device, added, removed = int(ALL_FEATURES), 0, 0
    words = [word.strip() for word in text.split(",") if word.strip()]
    if any(_is_plain(word) for word in words):
        device = 0
    for word in words:
        name = _plain_name(word)
        on = not word.startswith("-")
        if name in BalloonFeature.__members__:
            mask = int(BalloonFeature[name])
            device = device | mask if on else device & ~mask
        elif name in _RING:
            mask = 1 << _RING[name]
            added = added | mask if on else added & ~mask
            removed = removed & ~mask if on else removed | mask
        else:
            known = ", ".join([*BalloonFeature.__members__, *_RING])
            raise UsageError(f"unknown feature {word!r}; known: {known}")
    if device & BalloonFeature.FREE_PAGE_WALK and not device & BalloonFeature.PAGE_POISON:
        raise UsageError(
            "FREE_PAGE_WALK needs PAGE_POISON, or the contents that a guest expects in free pages "
            "are unknown; remove both (-FREE_PAGE_WALK,-PAGE_POISON) or neither"
        )
    return Offered(
        device,
        vhost_user.DEFAULT_RING_FEATURES & ~removed | added,
        virtio_pci.DEFAULT_RING_FEATURES & ~removed | added,
    )


def _plain_name(word: str) -> str:
    name = word.lstrip("+-").upper().replace("-", "_")
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _is_plain(word: str) -> bool:
    """Return whether *word* names a balloon feature without + or -."""
    return word[0] not in "+-" and _plain_name(word) in BalloonFeature.__members__
