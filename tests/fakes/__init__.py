# SPDX-License-Identifier: Apache-2.0
"""Stand-ins that tests drive the device with: a virtqueue driver, guest memory of our own."""
