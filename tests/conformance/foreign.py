# SPDX-License-Identifier: Apache-2.0
"""Run the suite on back-ends of other projects, from Debian packages, and keep the reports.

``python -m tests.conformance.foreign [NAME ...]`` unpacks the packages into the lab's cache (the
host gets none), starts a new back-end for every test, and writes
``docs/conformance/NAME.html``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.lab import cache, debs
from tests.lab.provision import BACKPORTS, BOOKWORM, TRIXIE

from virtio_conformance.page import render
from virtio_conformance.record import Run
from virtio_conformance.verdict import verdicts

DOCS = Path(__file__).parents[2] / "docs" / "conformance"


class Snapshot(debs.Release):
    """A release whose mirror may be a copy that is no longer renewed; it is signed all the same."""

    def _configuration(self) -> str:
        return super()._configuration() + 'Acquire::Check-Valid-Until "false";\n'


SID = Snapshot("sid", ("sid",))
LIBRARIES = "usr/lib/x86_64-linux-gnu"


@dataclass(frozen=True)
class Backend:
    """A back-end: its package, and the command that starts it."""

    name: str
    title: str
    release: debs.Release
    packages: tuple[str, ...]
    program: str
    arguments: str
    """``{root}`` is where the packages are unpacked; the rest is filled in by the suite."""
    device: str
    target: str | None = None
    options: tuple[str, ...] = ()

    def root(self) -> Path:
        """Return the folder of the unpacked packages in the lab's cache."""
        recipe = [self.release.name, *self.packages, self.target]

        def fill(folder: Path) -> None:
            self.release.update()
            files = self.release.fetch_closure(list(self.packages), self.target)
            debs.unpack(files, folder)

        return cache.build_locked(f"foreign-{self.name}", recipe, "foreign", fill)

    def words(self) -> str:
        """Return the command that starts the program from the unpacked packages."""
        root = self.root()
        places = f"{root / LIBRARIES}:{root / LIBRARIES / 'ceph'}"
        loader = f"{root}/lib64/ld-linux-x86-64.so.2 --library-path {places}"
        return f"{loader} {root / self.program}"

    def plain(self, text: str) -> str:
        """Return *text* with the program's name, as if the package were installed."""
        return text.replace(self.words(), Path(self.program).name).replace(str(self.root()), "")


BLK = (
    "--blockdev driver=file,node-name=d0,filename={dir}/disk.img --export"
    " type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path={socket},writable=on,"
    "num-queues=2"
)
DISK = ("--before", "truncate -s 16M {dir}/disk.img")
BACKENDS = (
    Backend(
        "qemu-storage-daemon-7.2", "QEMU storage daemon 7.2 (vhost-user-blk, libvhost-user)",
        BOOKWORM, ("qemu-system-common",), "usr/bin/qemu-storage-daemon", BLK, "blk", options=DISK,
    ),
    Backend(
        "qemu-storage-daemon-11.1", "QEMU storage daemon 11.1 (vhost-user-blk, libvhost-user)",
        TRIXIE, ("qemu-utils",), "usr/bin/qemu-storage-daemon", BLK, "blk", BACKPORTS, DISK,
    ),
    Backend(
        "virtiofsd-c-7.2", "virtiofsd of QEMU 7.2 (C, libvhost-user)", BOOKWORM,
        ("qemu-system-common",), "usr/lib/qemu/virtiofsd",
        "--socket-path={socket} -o source={dir} -o sandbox=chroot -f", "fs",
    ),
    Backend(
        "virtiofsd-rust-1.13", "virtiofsd 1.13 (Rust, rust-vmm)", TRIXIE, ("virtiofsd",),
        "usr/libexec/virtiofsd",
        "--socket-path={socket} --shared-dir={dir} --sandbox=none --seccomp=none"
        " --inode-file-handles=never", "fs",
    ),
    Backend(
        "vhost-device-vsock-0.3", "vhost-device-vsock 0.3 (Rust, rust-vmm)", SID,
        ("vhost-device-vsock",), "usr/bin/vhost-device-vsock",
        "--vm guest-cid=3,uds-path={dir}/uds,socket={socket}", "vsock",
    ),
    Backend(
        "dpdk-testpmd-22.11", "DPDK vhost 22.11 (testpmd, rte_vhost)", BOOKWORM,
        ("dpdk-dev", "librte-net-vhost23", "librte-mempool-ring23"), "usr/bin/dpdk-testpmd",
        "-d {root}/usr/lib/x86_64-linux-gnu/dpdk/pmds-23.0"
        " -l 0-1 --no-huge -m 256 --no-pci --no-telemetry --no-shconf --file-prefix=conf"
        " --vdev net_vhost0,iface={socket},queues=1 -- --forward-mode=io --port-topology=loop"
        " --auto-start --total-num-mbufs=4096 --stats-period=3600", "net",  # not ended by its input
        options=("--polls", "--keep", "--start-limit", "30"),
    ),
)  # fmt: skip


def run(backend: Backend, more: list[str]) -> Run:
    """Run the suite on one back-end."""
    with tempfile.TemporaryDirectory(prefix="foreign-") as folder:
        results = Path(folder) / "results.json"
        command = [sys.executable, "-m", "virtio_conformance.run"]
        arguments = backend.arguments.replace("{root}", str(backend.root()))
        command += ["--spawn", f"{backend.words()} {arguments}"]
        command += ["--device", backend.device, "--json", str(results), *backend.options, *more]
        subprocess.run(command, stdout=subprocess.DEVNULL)
        plain = backend.plain(results.read_text(encoding="utf-8"))
        results.write_text(plain, encoding="utf-8")
        return Run.load(results)


def main() -> None:
    """Run the suite on the named back-ends, or on all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(b.name for b in BACKENDS))
    parser.add_argument("--option", action="append", default=[], help="passed on to the suite")
    args = parser.parse_args()
    for backend in BACKENDS:
        if args.names and backend.name not in args.names:
            continue
        found = run(backend, args.option)
        found.backend = f"{backend.title}: {found.backend}"
        DOCS.mkdir(parents=True, exist_ok=True)
        page = render(found, verdicts(found))
        (DOCS / f"{backend.name}.html").write_text(page, encoding="utf-8")
        failed = sum(record.outcome == "failed" for record in found.records)
        print(f"{backend.name}: {len(found.records)} tests, {failed} failed, {found.seconds:.0f} s")


if __name__ == "__main__":
    main()
