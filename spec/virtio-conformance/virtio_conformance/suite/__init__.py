# SPDX-License-Identifier: Apache-2.0
"""The tests.  Each carries the ids of the rows of the catalogue that it checks."""
