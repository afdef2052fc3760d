# SPDX-License-Identifier: Apache-2.0
"""The public names of every package: a change of them is a decision, not an accident."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import tomllib

import pytest
from tests.roots import PACKAGES, REPOSITORY

import vballoon

PUBLIC = {
    "fdsocket": """MAX_FDS Acceptor AddressInUse FdStream Receiver TruncatedError adopt close_fds
        connect is_listening listen receive_some send_some""",
    "vfio_user": """BaseState ConfigSpace DmaChannel DmaError DmaLog DmaRegion DmaTable FatalError
        IntxPin IoEvent IrqTable MigrationMachine PciDevice Region RequestError Server Session
        SessionLimits SessionState UsageError VfioUserError run_program serve""",
    "vballoon.errors": """MemoryFault PeerError ProtocolError QueueError UsageError
        VballoonError""",
    "vballoon.memory": """PAGE_SHIFT PAGE_SIZE VHOST_LOG_PAGE BitmapLog ByteRanges DirtyLog
        Discarder GuestMemory MemoryRegion PageRanges RemoteMemory data_extents file_extents
        resident_bytes""",
    "vballoon.virtqueue": """RULES ChainBatch Engine InflightLog NullInflight Resubmit RingAddresses
        RingState Virtqueue empty_batch make_virtqueue""",
    "vballoon.skipmap": """VOIDS BitmapLayout FrozenExport Instant PageBitmap
        Provenance RegionBits Round RoundKind RoundState SkipExport SkipMap SkipMapState
        VoidReason combine write_export""",
    "vballoon.virtio": """DeviceQueue QueueStatus RegionStatus RingFault RingOwner RingRecord
        RingSet Transport TransportEvents TransportStatus VirtioDevice check_record feature_names
        internal_fault pack_record region_statuses unpack_record""",
    "vballoon.balloon": "Balloon ConfigSpace Counters GuestStats Role settle_roles",
    "vballoon.vhost_user": """DEFAULT_RING_FEATURES PROTOCOL_FEATURES Session VhostUserBackend
        VhostUserServer""",
    "vballoon.virtio_pci": "DEFAULT_RING_FEATURES VirtioPciFunction",
    "vballoon.control": "ControlClient",
    "vballoon.cli": "main vhost_user_main",
    "virtio_formats.wire": "WireError WireStruct c_struct dtype_of struct_format",
    "vballoon_spec.skipmap": """FORMAT_NAME FORMAT_VERSION LIVE_MAGIC LIVE_VERSION MANIFEST_FILE
        PAGE_SIZE PROVENANCES BitmapFile LiveHeader LiveRoundState Manifest ManifestError
        ManifestRegion ManifestRound page_sums""",
}


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_are_these(package):
    assert set(importlib.import_module(package).__all__) == set(PUBLIC[package].split())


def test_version_is_the_one_in_pyproject():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert vballoon.__version__ == project["version"]


def all_modules():
    for top in PACKAGES:
        package = importlib.import_module(top)
        yield top
        for info in pkgutil.walk_packages(package.__path__, f"{top}."):
            if not info.name.endswith("__main__") and ".suite" not in info.name:
                yield info.name


@pytest.mark.parametrize("name", list(all_modules()))
def test_what_a_module_offers_is_there_and_documented(name):
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        thing = getattr(module, public)
        declared = "<locals>" not in getattr(thing, "__qualname__", "<locals>")
        if declared and (inspect.isclass(thing) or inspect.isfunction(thing)):
            assert inspect.getdoc(thing), f"{name}.{public} has no docstring"
