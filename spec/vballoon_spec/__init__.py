# SPDX-License-Identifier: Apache-2.0
"""What is right: wire formats, requirements and the conformance suite.

Imports nothing from the device; the device imports the formats from here.
"""
