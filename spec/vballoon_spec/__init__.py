# SPDX-License-Identifier: Apache-2.0
"""Specifications of vballoon: the walk queue, the skip bitmap, snapshots, the safety model."""
