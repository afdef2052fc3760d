# SPDX-License-Identifier: Apache-2.0
"""Wire formats of virtio: rings and the balloon device.

Declarations name the label of the virtio specification that they were read from; the revision is
in each module.
"""
