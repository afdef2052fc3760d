# SPDX-License-Identifier: Apache-2.0
"""What vballoon itself specifies: the walk queue, the skip bitmap, snapshots, the safety model."""
