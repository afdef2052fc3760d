# SPDX-License-Identifier: Apache-2.0
"""Virtio over PCI, served over vfio-user.

:class:`VirtioPciFunction` gives any :class:`~vballoon.virtio.VirtioDevice` a modern virtio
PCI function; the package ``vfio_user`` does the rest.
"""

from __future__ import annotations

from vballoon.virtio_pci.function import DEFAULT_RING_FEATURES, VirtioPciFunction

__all__ = ("DEFAULT_RING_FEATURES", "VirtioPciFunction")
