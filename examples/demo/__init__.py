# SPDX-License-Identifier: Apache-2.0
"""``make demo``: the main job of vballoon, told on a real guest, with figures."""
