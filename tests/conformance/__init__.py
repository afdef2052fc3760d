# SPDX-License-Identifier: Apache-2.0
"""The suite judged: real backends of other projects, and mutants of our own."""
