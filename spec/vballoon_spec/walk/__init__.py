# SPDX-License-Identifier: Apache-2.0
"""The walk queue: an extension of the memory balloon device (``walk-queue.md`` is its chapter).

``formats`` declares the buffers, ``header`` generates the guest module's C header from them.
"""
