# SPDX-License-Identifier: Apache-2.0
"""Back-ends that share no code with vballoon, for the suite to judge."""
