# SPDX-License-Identifier: Apache-2.0
"""A conformance suite for vhost-user and vfio-user back-ends; no virtual machine needed.

The driver side (:mod:`.memory`, :mod:`.ring`, :mod:`.vhost_user`, :mod:`.vfio_user`,
:mod:`.observe`) is written for this suite alone and shares only the declared wire formats with
the rest of the project, so that the suite does not repeat a misunderstanding of the device.
It is synchronous and simple, and can do what a faulty driver or front-end does.

:mod:`.rig` brings a device up over either transport, :mod:`.profiles` knows one valid request for
each device type, ``suite/`` holds the tests, :mod:`.plugin` makes them a pytest plugin and
:mod:`.run` is the command.
"""
