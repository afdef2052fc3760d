# SPDX-License-Identifier: Apache-2.0
"""Tests of the conformance suite: back-ends of other projects, and mutants of this one."""
