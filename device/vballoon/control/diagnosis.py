# SPDX-License-Identifier: Apache-2.0
"""Name what is wrong with the configuration of a machine, from the reply of ``query-status``.

This is a pure function of the reply, so that the server's log, ``vballoon status`` and ``vballoon
doctor`` say the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

__all__ = ("Problem", "problems")

QUEUES_MIN = 5
"""Queues that Linux asks for with the features that are offered by default, without walks."""


class Problem(NamedTuple):
    """One problem: its stable name, what is wrong, and what to do."""

    name: str
    what: str
    remedy: str
    wrong: bool = True
    """The configuration is wrong; False: what is missing may still come, as in a booting guest."""


def problems(status: Mapping[str, Any]) -> list[Problem]:
    """Return the problems that *status*, a reply of ``query-status``, shows."""
    if not status.get("connected"):
        return [NO_FRONT_END]
    return [*_set_up(status), *_queues(status)]


NO_FRONT_END = Problem(
    "no-front-end",
    "no front-end is connected",
    "start QEMU with a device whose socket is the one that vballoon serves",
    wrong=False,
)
NO_DRIVER = Problem(
    "no-driver",
    "no balloon driver runs in the guest",
    "wait until the guest has booted and is not paused, then load virtio_balloon there",
    wrong=False,
)
NOT_SHARED = Problem(
    "memory-not-shared",
    "the driver has set up its queues, but the front-end shares no guest memory",
    "use QEMU's -object memory-backend-memfd,share=on,... with -machine memory-backend=ID",
)
NO_CONFIG = Problem(
    "no-config-space",
    "the front-end shows the guest no configuration space, so no target and no round reaches it",
    "add config_size=24 to QEMU's -device option",
)
TRANSLATED = Problem(
    "translated-addresses",
    "the client has unmapped all guest memory: an IOMMU of the guest translates this device's "
    "addresses, and a balloon needs guest-physical ones",
    "boot the guest with iommu=pt, or attach the device over vhost-user",
)


def _set_up(status: Mapping[str, Any]) -> Iterator[Problem]:
    vhost_user = status.get("transport") == "vhost-user"
    front_end_queues = status.get("front-end-queues", 0)
    protocol = status.get("protocol-features", [])
    set_up = any(queue["size"] for queue in status.get("queues", []))
    if vhost_user and not (front_end_queues or protocol or set_up):
        yield Problem(
            "silent-front-end",
            f"process {status.get('peer-pid') or '?'} is connected and has not set up the device",
            "if it is not QEMU, end it; it is disconnected if it sends nothing while QEMU waits",
        )
        return
    if vhost_user and 0 < front_end_queues < QUEUES_MIN:
        yield Problem(
            "too-few-queues",
            f"the front-end has {front_end_queues} queues, and the guest's driver needs "
            f"{QUEUES_MIN} (it fails with error -22 otherwise)",
            "set num_vqs=6 in QEMU's -device option",
        )
    if vhost_user and "CONFIG" not in protocol:
        yield NO_CONFIG
    if status.get("memory-unmapped"):
        yield TRANSLATED
    elif set_up and not status.get("regions"):
        yield NOT_SHARED
    elif not status.get("driver-running"):
        yield NO_DRIVER


def _queues(status: Mapping[str, Any]) -> Iterator[Problem]:
    for queue in status.get("queues", []):
        if queue.get("broken"):
            yield Problem(
                "broken-queue",
                f"queue {queue['index']} is stopped: the driver broke the rule {queue['broken']}",
                "read the server's log; unload and load the guest's driver to use it again",
            )
