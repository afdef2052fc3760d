# SPDX-License-Identifier: Apache-2.0
"""Wire formats of virtio, vhost-user, vfio-user and PCI, each declared once."""
