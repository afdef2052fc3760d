# SPDX-License-Identifier: Apache-2.0
"""``make demo``: show the main functions of vballoon on a real guest, with measurements."""
