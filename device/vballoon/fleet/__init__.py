# SPDX-License-Identifier: Apache-2.0
"""Looking at many machines at once, through their control sockets.

This room only asks.  It runs in a process of its own, beside the keeper, and believes no answer:
``sample`` checks what a server says, ``watching`` asks many servers with a time limit for each,
``exposition`` turns the answers into metrics.
"""
