# SPDX-License-Identifier: Apache-2.0
"""The reference consumer of the skip bitmap: save a running VM without its free memory.

``take`` has the two orders of steps, ``steps`` and ``live`` the steps, ``journal`` and
``recovery`` the way back from each.  ``qmp_vm`` speaks to QEMU, ``memmap`` reads the guest's free
lists, ``copy`` moves bytes, and ``store`` and ``pipe`` are what a snapshot is written to.
"""
