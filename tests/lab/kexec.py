# SPDX-License-Identifier: Apache-2.0
"""Start another kernel in a running guest without a reset of the machine, as kdump does."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tests.lab import initramfs
from tests.lab.cache import LabError
from tests.lab.guestkernels import kernel
from tests.lab.machine import Machine
from tests.lab.qemu import APPEND

SOURCE = Path(__file__).parent / "guest/kexec.c"


def files(name: str = "6.12") -> dict[str, bytes | Path]:
    """Return what a guest needs for :func:`start`, as :class:`Machine` takes ``files``."""
    guest_kernel = kernel(name)
    return {
        "lab/kexec": _program(),
        "kexec/vmlinuz": guest_kernel.image,
        "kexec/initrd": initramfs.base(guest_kernel),
    }


def start(vm: Machine, append: str = "") -> None:
    """Start the kernel anew with *append* as further parameters, and wait until it is up."""
    vm.guest.post(f"kexec /kexec/vmlinuz /kexec/initrd '{APPEND} {append}'")
    vm.wait_until_up()


def _program() -> bytes:
    builder = kernel("6.12").build_root
    with tempfile.TemporaryDirectory() as work:
        shutil.copy2(SOURCE, work)
        script = "gcc -static -O2 -Wall -Wextra -Werror -o kexec kexec.c && base64 kexec"
        status, text = kernel("6.12").run_in_root(Path(work), ["sh", "-c", script])
    if status:
        raise LabError(f"guest/kexec.c does not compile in {builder}:\n{text}")
    import base64

    return base64.b64decode(text)
