# SPDX-License-Identifier: Apache-2.0
"""Fakes for tests: drivers, front-ends, clients and guest memory."""
