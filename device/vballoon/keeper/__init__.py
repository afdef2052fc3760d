# SPDX-License-Identifier: Apache-2.0
"""Processes: a keeper that holds the descriptors, and one worker for each virtual machine.

The package itself imports nothing: the keeper must listen before NumPy is loaded.
"""
