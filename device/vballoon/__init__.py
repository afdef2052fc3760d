# SPDX-License-Identifier: Apache-2.0
"""A virtio-balloon device that lives outside the virtual machine monitor.

The rooms, from the ground up, and what each may import, are in ``docs/architecture.md``;
``tests/unit/test_layering.py`` holds the code to it.
"""
