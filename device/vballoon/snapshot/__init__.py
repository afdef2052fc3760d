# SPDX-License-Identifier: Apache-2.0
"""The reference consumer of the skip bitmap: snapshot a running VM without its free memory.

``steps`` is the order of things and the way back from each; ``qmp_vm`` knows QEMU, ``memmap`` the
guest's free lists, ``copy`` the bytes, ``store`` the directory that comes out of it.
"""
