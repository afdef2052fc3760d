# SPDX-License-Identifier: Apache-2.0
"""Fakes that tests drive the device with: drivers, front-ends, clients and guest memory."""
