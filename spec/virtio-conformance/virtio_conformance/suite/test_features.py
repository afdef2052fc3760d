# SPDX-License-Identifier: Apache-2.0
"""Offered and accepted features, and the configuration space before negotiation."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from virtio_conformance.findings import Closed, Finding, not_applicable, require
from virtio_conformance.rig import Rig
from virtio_conformance.rig_vfio_user import VfioUserRig
from virtio_conformance.rig_vhost_user import VhostUserRig
from virtio_formats.virtio import features as f

V1 = 1 << f.VIRTIO_F_VERSION_1
RESERVED_TOP = 42
"""Bits 24 to 49 belong to rings and transports; the standard gives 24 to 41 a meaning or a hole."""
DEFINED = {
    24, 26, 27, 28, 29, 30, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42,
}  # fmt: skip
"""Defined by the standard, or (26, 30; legacy 24 and 27) by vhost and by transitional devices."""
REQUIRES = {
    "net": {7: [1], 8: [1], 9: [7], 10: [7], 11: [0], 12: [0], 14: [1], 15: [14], 17: [17]},
    "balloon": {},
    "blk": {},
}


@pytest.mark.requirement("basic.features.version-1")
def test_version_1_is_offered(split_rig: Rig) -> None:
    """VERSION_1 is offered."""
    require(split_rig.offered & V1, f"offered are {split_rig.offered:#x}")


@pytest.mark.requirement("basic.features.only-supported", "basic.features.no-sr-iov")
def test_only_known_bits_are_offered(split_rig: Rig) -> None:
    """No feature is offered that has no meaning on this transport."""
    rig = split_rig
    known = rig.profile.known_features | sum(1 << bit for bit in DEFINED)
    if rig.transport == "vhost-user":
        known &= ~(1 << f.VIRTIO_F_SR_IOV)
    surplus = rig.offered & ~known
    require(not surplus, f"offered bits without a meaning: {surplus:#x}")


@pytest.mark.requirement("basic.features.dependencies")
def test_offer_is_closed(split_rig: Rig) -> None:
    """What an offered feature requires is offered too."""
    rig = split_rig
    missing = [
        (bit, other)
        for bit, others in REQUIRES.get(rig.profile.name, {}).items()
        for other in others
        if f.has(rig.offered, bit) and not f.has(rig.offered, other)
    ]
    for bit in (f.VIRTIO_F_RING_PACKED, f.VIRTIO_F_IN_ORDER, f.VIRTIO_F_RING_RESET):
        if f.has(rig.offered, bit) and not rig.offered & V1:
            missing.append((bit, f.VIRTIO_F_VERSION_1))
    require(not missing, f"features without those they require: {missing}")


def offered_bits(rig: Rig) -> list[int]:
    """Return the bits besides VERSION_1 that have no further obligations for a front-end."""
    skip = {f.VIRTIO_F_VERSION_1, f.VIRTIO_F_ACCESS_PLATFORM, f.VIRTIO_F_SR_IOV, 24, 26, 30}
    return [bit for bit in range(64) if f.has(rig.offered, bit) and bit not in skip]


@pytest.mark.requirement("basic.features.subsets")
@pytest.mark.parametrize("which", ["each-alone", "all-but-one", "all", "none"])
def test_subsets_are_accepted(new_rig: Callable[..., Rig], which: str) -> None:
    """Any subset of the offer whose dependencies are complete is accepted."""
    rig = new_rig(False)
    bits = offered_bits(rig)
    everything = sum(1 << bit for bit in bits) | V1
    sets = {
        "none": [V1],
        "all": [everything],
        "each-alone": [V1 | 1 << bit for bit in bits],
        "all-but-one": [everything & ~(1 << bit) for bit in bits],
    }[which]
    if rig.profile.name == "net":
        sets = sets[:0] if which in ("each-alone", "all-but-one") else sets
        if not sets:
            not_applicable("network features depend on each other")
    rig.negotiate(sets[0])
    for features in sets[1:]:
        renegotiate(rig, features)


def renegotiate(rig: Rig, features: int) -> None:
    """Settle another set of features on the same connection."""
    if isinstance(rig, VhostUserRig):
        rig.reset_features(features)
    elif isinstance(rig, VfioUserRig) and not rig.pci.accept(features):
        raise Finding(f"features {features:#x} were refused")


@pytest.mark.requirement("basic.features.refusal")
def test_bits_that_are_not_offered(new_rig: Callable[..., Rig]) -> None:
    """A set with a bit that was not offered is refused, or that bit has no effect."""
    rig = new_rig(False)
    bit = next(bit for bit in (41, 40, 38, 35, 20) if not f.has(rig.offered, bit))
    rig.negotiate(V1)
    try:
        renegotiate(rig, V1 | 1 << bit)
    except Closed:
        return
    except Finding as refusal:
        require("refused" in str(refusal), str(refusal))
        return
    require(
        rig.transport == "vhost-user",
        f"FEATURES_OK stays set although feature {bit} was never offered",
    )
    if rig.usable() and rig.profile.has_requests:
        rig.leave()
        if rig.target.ends_after_a_connection():
            return
        again = new_rig(False)
        again.bring_up()
        again.run([again.profile.exchange(again, 0)])


@pytest.mark.requirement("basic.features.renegotiate")
def test_the_same_set_again(new_rig: Callable[..., Rig]) -> None:
    """A set that was accepted is accepted again."""
    rig = new_rig(False)
    everything = sum(1 << bit for bit in offered_bits(rig)) | V1
    rig.negotiate(everything)
    for _ in range(3):
        renegotiate(rig, everything)


@pytest.mark.requirement("basic.config.readable-early")
def test_configuration_before_features(split_rig: Rig) -> None:
    """Configuration can be read before features are negotiated."""
    rig = split_rig
    size = rig.profile.config_size
    if not size:
        not_applicable("this device has no configuration that the suite knows")
    if isinstance(rig, VhostUserRig):
        rig.need_protocol_early()
    found = rig.read_config(0, size)
    require(len(found) == size, f"{len(found)} bytes of configuration, asked for {size}")
    again = rig.read_config(0, size)
    require(found == again, "two reads of an idle device differ")


@pytest.mark.requirement("basic.status.idle-before-driver-ok")
def test_nothing_before_driver_ok(rig: Rig) -> None:
    """Before DRIVER_OK no buffer is taken and no notification is sent."""
    ring = rig.bring_up(ready=False)
    if not rig.has_status:
        not_applicable("without PROTOCOL_F_STATUS vhost-user does not carry DRIVER_OK")
    placed = rig.submit(rig.request())
    before = rig.ram.picture()
    ring.publish()
    rig.kick(rig.profile.main)
    rig.expect_quiet(0.2)
    rig.ram.expect_untouched(before, ring.publish_span)
    require(not rig.calls[rig.profile.main].take(), "a notification before DRIVER_OK")
    rig.driver_ok()
    rig.kick(rig.profile.main)
    rig.check([placed], rig.collect(ring, 1))
