# SPDX-License-Identifier: Apache-2.0
"""Run a device as a program of its own.

``Backend Program Conventions`` of the vfio-user specification (QEMU 11.1): stay in the foreground,
end on SIGTERM, take ``--socket-path`` or ``--fd``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Sequence

import fdsocket
from vfio_user.device import PciDevice
from vfio_user.link import SessionLimits
from vfio_user.server import Server

__all__ = ("run_program", "serve")


async def serve(
    device: PciDevice,
    *,
    path: str | os.PathLike[str] | None = None,
    fd: int | None = None,
    limits: SessionLimits | None = None,
) -> None:
    """Serve *device* on a socket at *path*, or on the inherited socket *fd*.

    Return on SIGTERM and SIGINT, or when an inherited connection ends.  Raise :class:`OSError`
    when the socket cannot be opened.
    """
    if (path is None) == (fd is None):
        raise ValueError("either a path or a descriptor")
    loop, task, signalled = asyncio.get_running_loop(), asyncio.current_task(), False

    def stop() -> None:
        nonlocal signalled
        signalled = True
        if task is not None:
            task.cancel()

    # Before the socket exists: whoever sees it may send a signal at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    sock = fdsocket.listen(path) if path is not None else fdsocket.adopt(fd or 0)
    try:
        await Server(device, sock, limits=limits).serve()
    except asyncio.CancelledError:
        if not signalled:
            raise
    finally:
        if path is not None:
            os.unlink(path)


def run_program(device: PciDevice, argv: Sequence[str] | None = None) -> int:
    """Run a device program from its command line; return the exit status."""
    import argparse  # only programs need it

    parser = argparse.ArgumentParser(description=(type(device).__doc__ or "").splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket-path", metavar="PATH", help="listen there for the client")
    where.add_argument("--fd", type=int, metavar="FDNUM", help="an inherited socket")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        asyncio.run(serve(device, path=options.socket_path, fd=options.fd))
    except OSError as error:
        logging.getLogger(__name__).error("%s", error)
        return 1
    return 0
