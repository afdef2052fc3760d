# SPDX-License-Identifier: Apache-2.0
"""Virtio over PCI, served over vfio-user.

:class:`VirtioPciFunction` presents any :class:`~vballoon.virtio.VirtioDevice` as a modern
virtio PCI function.  The package ``vfio_user`` serves that function to the client.
"""

from __future__ import annotations

from vballoon.virtio_pci.function import DEFAULT_RING_FEATURES, VirtioPciFunction

__all__ = ("DEFAULT_RING_FEATURES", "VirtioPciFunction")
