# SPDX-License-Identifier: Apache-2.0
"""Collect the state of a session, and continue from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from vfio_user.state import MigrationState, SessionState, require
from virtio_formats.vfio_user import VERSION_MINOR, DeviceState

if TYPE_CHECKING:
    from vfio_user.device import PciDevice
    from vfio_user.link import Link
    from vfio_user.remote import DmaRequests

__all__ = ("capture", "restore")


def capture(link: Link, device: PciDevice, requests: DmaRequests) -> SessionState:
    """Return the state of one connection; see :meth:`vfio_user.session.Session.state`."""
    return SessionState(
        base=device.base_state(),
        migration=device.migration.save(),
        client=link.client and replace(link.client, names=frozenset()),
        minor=VERSION_MINOR,
        twin=link.twin,
        layout=requests.layout.value,
        next_id=requests.next_id,
        owed=requests.owed,
        dma=device.dma.state(),
        irqs=device.irqs.client_state(),
        ranges=device.dma.log.ranges,
    )


def restore(
    link: Link,
    device: PciDevice,
    requests: DmaRequests,
    state: SessionState,
    fds: Mapping[int, int],
) -> None:
    """Continue from *state*; see :meth:`vfio_user.session.Session.restore`."""
    require(link.client is None and not device.dma.regions, "the device has a client")
    _check(link, device, state, fds)
    requests.restore(state.layout, state.next_id, state.owed)
    device.restore_base(state.base)
    device.migration.restore(state.migration)
    link.client, link.twin = state.client, state.twin
    if state.client is None:
        return
    try:
        _take(link, device, state, fds)
    except BaseException:
        link.client = None
        device.disconnect("the state was not accepted")
        device.migration.reset()
        raise


def _check(link: Link, device: PciDevice, state: SessionState, fds: Mapping[int, int]) -> None:
    require(state.minor <= VERSION_MINOR, f"version 0.{state.minor}")
    require(not state.twin or link.open_twin is not None, "no socket for server commands")
    slots = state.slots
    require(len(set(slots)) == len(slots), "a descriptor in two places")
    require(set(slots) <= set(fds), f"no descriptor in slots {sorted(set(slots) - set(fds))}")
    device.check_base(state.base)
    device.dma.check(state.dma, fds, link.limits.max_dma_maps)
    device.irqs.check_client(state.irqs, fds)
    device.dma.log.check(state.ranges or ())
    device.migration.check(state.migration)
    running = MigrationState(state=DeviceState.RUNNING)
    require(device.migratable or state.migration == running, "the device does not migrate")
    nothing = not (state.dma or state.irqs or state.twin) and state.ranges is None
    require(state.client is not None or nothing, "set up by a client that has not negotiated")


def _take(link: Link, device: PciDevice, state: SessionState, fds: Mapping[int, int]) -> None:
    device.dma.channel = link.channel
    device.attached()
    device.dma.restore(state.dma, fds)
    device.irqs.restore_client(state.irqs, fds)
    if state.ranges is not None:
        device.dma.log.restore(state.ranges)
        device.dma_logging(True)
        # What was written before is not known any more: report everything once.
        for window in state.dma:
            device.dma.log.mark(window.address, window.size)
