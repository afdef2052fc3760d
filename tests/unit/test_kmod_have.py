# SPDX-License-Identifier: Apache-2.0
"""How the guest module's build learns what a kernel has, and which kernels DKMS leaves out."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from tests.roots import REPOSITORY

DRIVER = REPOSITORY / "driver_kmod"
PAGE_FLAGS = """
#ifdef CONFIG_HUGETLB_PAGE_OPTIMIZE_VMEMMAP
extern int hugetlb_optimize_vmemmap_key;
#endif
"""


def have(headers: Path, *options: str) -> set[str]:
    """Return the names that ``have.sh`` defines for a folder of headers."""
    command = ["sh", str(DRIVER / "have.sh"), "cc", f"-I{headers}", "-nostdinc", *options]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"^#define (VBW_HAVE_\w+) 1$", text, re.MULTILINE))


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    (tmp_path / "linux").mkdir()
    (tmp_path / "linux/mm.h").write_text("struct page;\n")
    (tmp_path / "linux/page-flags.h").write_text(PAGE_FLAGS)
    return tmp_path


def test_a_name_within_an_ifdef_is_there_only_where_it_is_configured(headers: Path) -> None:
    assert have(headers) == set()
    assert have(headers, "-DCONFIG_HUGETLB_PAGE_OPTIMIZE_VMEMMAP") == {"VBW_HAVE_HVO_KEY"}


def test_a_compiler_that_reads_no_header_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        have(tmp_path)


@pytest.mark.parametrize(
    ("release", "built"),
    [
        ("4.19.0-27-amd64", False),
        ("5.10.0-32-amd64", False),
        ("6.0.0-1-amd64", False),
        ("6.1.0-40-cloud-amd64", True),
        ("6.12.48+deb13-arm64-16k", True),
        ("7.3.2+deb14-amd64", True),
        ("10.0.1", True),
    ],
)
def test_dkms_builds_for_releases_that_the_sources_know(release: str, built: bool) -> None:
    conf = (DRIVER / "dkms.conf").read_text()
    found = re.search(r'^BUILD_EXCLUSIVE_KERNEL="(.*)"$', conf, re.MULTILINE)
    assert found is not None
    assert bool(re.match(found[1], release)) == built
    assert "CONFIG_64BIT" in conf


def test_the_example_for_modprobe_leaves_the_device_to_this_driver() -> None:
    lines = (DRIVER / "vballoon_walk.conf").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["blacklist virtio_balloon"]
