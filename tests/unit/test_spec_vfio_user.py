# SPDX-License-Identifier: Apache-2.0
"""The wire formats of vfio-user, PCI and virtio-pci against the tables of their specifications.

The offsets below are typed from the specifications' tables, not from the declarations.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio_formats import pci
from virtio_formats import vfio_user as v
from virtio_formats.virtio import pci as vpci
from virtio_formats.wire import WireError, WireStruct

TABLES: dict[type[WireStruct], tuple[int, dict[str, int]]] = {
    v.Header: (16, {"id": 0, "command": 2, "size": 4, "flags": 8, "error": 12}),
    v.Version: (4, {"major": 0, "minor": 2}),
    v.DmaMap: (32, {"argsz": 0, "flags": 4, "offset": 8, "address": 16, "size": 24}),
    v.DmaUnmap: (24, {"argsz": 0, "flags": 4, "address": 8, "size": 16}),
    v.DeviceInfo: (16, {"argsz": 0, "flags": 4, "num_regions": 8, "num_irqs": 12}),
    v.RegionInfo: (
        32,
        {"argsz": 0, "flags": 4, "index": 8, "cap_offset": 12, "size": 16, "offset": 24},
    ),
    v.InfoCapHeader: (8, {"id": 0, "version": 2, "next": 4}),
    v.SparseMmap: (16, {"id": 0, "version": 2, "next": 4, "nr_areas": 8, "reserved": 12}),
    v.SparseMmapArea: (16, {"offset": 0, "size": 8}),
    v.RegionIoFds: (16, {"argsz": 0, "flags": 4, "index": 8, "count": 12}),
    v.IoEventFd: (
        40,
        {
            "offset": 0,
            "size": 8,
            "fd_index": 16,
            "type": 20,
            "flags": 24,
            "padding": 28,
            "datamatch": 32,
        },
    ),
    v.IrqInfo: (16, {"argsz": 0, "flags": 4, "index": 8, "count": 12}),
    v.IrqSet: (20, {"argsz": 0, "flags": 4, "index": 8, "start": 12, "count": 16}),
    v.RegionAccess: (16, {"offset": 0, "region": 8, "count": 12}),
    v.RegionMessage: (32, {"id": 0, "size": 4, "offset": 16, "region": 24, "count": 28}),
    v.DmaAccess: (16, {"address": 0, "count": 8}),
    v.DmaAccess32: (12, {"address": 0, "count": 8}),
    v.WriteMulti: (8, {"wr_cnt": 0}),
    v.WriteOne: (24, {"offset": 0, "region": 8, "count": 12, "data": 16}),
    v.DeviceFeature: (8, {"argsz": 0, "flags": 4}),
    v.Migration: (8, {"flags": 0}),
    v.MigState: (8, {"device_state": 0, "data_fd": 4}),
    v.LoggingControl: (16, {"page_size": 0, "num_ranges": 8, "reserved": 12}),
    v.LoggingRange: (16, {"iova": 0, "length": 8}),
    v.LoggingReport: (24, {"iova": 0, "length": 8, "page_size": 16}),
    v.MigData: (8, {"argsz": 0, "size": 4}),
    pci.Type0Header: (
        64,
        {
            "vendor_id": 0,
            "command": 4,
            "status": 6,
            "revision_id": 8,
            "prog_if": 9,
            "base_class": 11,
            "header_type": 14,
            "bars": 16,
            "subsystem_vendor_id": 0x2C,
            "subsystem_id": 0x2E,
            "rom_address": 0x30,
            "capability_list": 0x34,
            "interrupt_line": 0x3C,
            "interrupt_pin": 0x3D,
        },
    ),
    pci.ExtendedCapabilityHeader: (4, {"word": 0}),
    pci.PowerManagementCapability: (8, {"pmc": 2, "pmcsr": 4}),
    pci.MsiCapability: (14, {"control": 2, "address": 4, "data": 12}),
    pci.MsixCapability: (12, {"control": 2, "table": 4, "pba": 8}),
    pci.MsixTableEntry: (16, {"address": 0, "data": 8, "control": 12}),
    pci.ExpressCapability: (
        60,
        {
            "flags": 2,
            "devcap": 4,
            "devctl": 8,
            "devsta": 10,
            "lnkcap": 12,
            "lnkctl": 16,
            "lnksta": 18,
            "sltcap": 20,
            "rtctl": 28,
            "devcap2": 36,
            "devctl2": 40,
            "lnkcap2": 44,
            "lnkctl2": 48,
            "sltsta2": 58,
        },
    ),
    vpci.VirtioPciCap: (
        16,
        {"cap_vndr": 0, "cap_len": 2, "cfg_type": 3, "bar": 4, "id": 5, "offset": 8, "length": 12},
    ),
    vpci.VirtioPciNotifyCap: (20, {"cfg_type": 3, "notify_off_multiplier": 16}),
    vpci.VirtioPciCfgCap: (20, {"bar": 4, "offset": 8, "length": 12, "pci_cfg_data": 16}),
    vpci.CommonConfig: (
        64,
        {
            "device_feature_select": 0,
            "device_feature": 4,
            "driver_feature_select": 8,
            "driver_feature": 12,
            "config_msix_vector": 16,
            "num_queues": 18,
            "device_status": 20,
            "config_generation": 21,
            "queue_select": 22,
            "queue_size": 24,
            "queue_msix_vector": 26,
            "queue_enable": 28,
            "queue_notify_off": 30,
            "queue_desc": 32,
            "queue_driver": 40,
            "queue_device": 48,
            "queue_notif_config_data": 56,
            "queue_reset": 58,
            "admin_queue_index": 60,
            "admin_queue_num": 62,
        },
    ),
    vpci.NotificationData: (4, {"vqn": 0, "next": 2}),
}


@pytest.mark.parametrize("kind", TABLES, ids=lambda kind: kind.__name__)
def test_sizes_and_offsets_are_the_specifications(kind: type[WireStruct]) -> None:
    size, offsets = TABLES[kind]
    assert size == kind.SIZE == kind.dtype().itemsize
    fields: dict[str, Any] = dict(kind.dtype().fields or {})
    assert {name: fields[name][1] for name in offsets} == offsets


def test_every_structure_is_in_the_tables() -> None:
    declared = {
        found
        for module in (v, pci, vpci)
        for found in vars(module).values()
        if isinstance(found, type) and issubclass(found, WireStruct) and found is not WireStruct
    }
    assert declared - set(TABLES) == {pci.CapabilityHeader}


@given(st.data())
def test_construct_and_numpy_read_the_same(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(TABLES, key=lambda k: k.__name__)))
    raw = data.draw(st.binary(min_size=kind.SIZE, max_size=kind.SIZE))
    parsed, viewed = kind.parse(raw), np.frombuffer(raw, kind.dtype())[0]
    for name in kind._names:
        value, seen = getattr(parsed, name), viewed[name].tolist()
        assert (list(value) if isinstance(value, bytes) else value) == seen
    assert parsed.build() == raw


def test_the_byte_order_is_the_hosts() -> None:
    raw = v.Header(id=1, command=9, size=16, flags=0, error=0).build()
    assert raw[:2] == (1).to_bytes(2, sys.byteorder)
    assert pci.MsixCapability(control=1).build()[2:4] == b"\1\0"


def test_commands_and_their_directions() -> None:
    assert {c.value for c in v.Command} == {*range(1, 14), 15, 16, 17, 18}
    assert {c.value for c in v.SERVER_COMMANDS} == {11, 12}
    assert set(v.Command) == v.CLIENT_COMMANDS | v.SERVER_COMMANDS


class TestCapabilities:
    def parse(self, value: object) -> v.Capabilities:
        return v.Capabilities.parse(json.dumps(value).encode() + b"\0")

    def test_nothing_means_the_defaults(self) -> None:
        found = v.Capabilities.parse(b"")
        assert (found.max_msg_fds, found.max_data_xfer_size) == (1, 1048576)
        assert (found.max_dma_maps, found.pgsizes, found.write_multiple) == (65535, 4096, False)
        assert self.parse({}) == found

    def test_everything_survives_a_round_trip(self) -> None:
        caps = v.Capabilities(
            max_msg_fds=3,
            max_data_xfer_size=5,
            max_dma_maps=7,
            pgsizes=4096 | 1 << 21,
            twin_socket=True,
            twin_socket_fd_index=0,
            write_multiple=True,
            migration_pgsize=4096,
            migration_max_bitmap_size=9,
        )
        found = v.Capabilities.parse(caps.build())
        assert found.names == {
            "max_msg_fds",
            "max_data_xfer_size",
            "max_dma_maps",
            "pgsizes",
            "twin_socket",
            "write_multiple",
            "migration",
        }
        assert v.Capabilities.parse(found.build()) == found
        assert found.migration_max_bitmap_size == 9

    def test_only_the_names_that_were_asked_for(self) -> None:
        text = v.Capabilities().build(frozenset({"max_msg_fds", "twin_socket"}))
        assert json.loads(text[:-1]) == {"capabilities": {"max_msg_fds": 1}}

    @pytest.mark.parametrize(
        "text",
        [
            b"{}",  # no NUL
            b"{\0",
            b'"\0',
            b"\xff\0",
            b"[]\0",
            b'{"capabilities": "23"}\0',
            b'{"capabilities": {"max_msg_fds": "foo"}}\0',
            b'{"capabilities": {"max_msg_fds": -1}}\0',
            b'{"capabilities": {"max_msg_fds": 1025}}\0',
            b'{"capabilities": {"max_msg_fds": true}}\0',
            b'{"capabilities": {"max_data_xfer_size": 1.5}}\0',
            b'{"capabilities": {"pgsizes": 2048}}\0',
            b'{"capabilities": {"migration": "23"}}\0',
            b'{"capabilities": {"migration": {"pgsize": "foo"}}}\0',
            b'{"capabilities": {"migration": {"pgsize": 4095}}}\0',
            b'{"capabilities": {"twin_socket": true}}\0',
            b'{"capabilities": {"twin_socket": {"supported": 1}}}\0',
            b'{"capabilities": {"write_multiple": 1}}\0',
            b"[" * 100000 + b"\0",
        ],
    )
    def test_malformed(self, text: bytes) -> None:
        with pytest.raises(WireError):
            v.Capabilities.parse(text)

    @given(st.binary(max_size=200))
    def test_any_bytes_are_capabilities_or_an_error(self, data: bytes) -> None:
        try:
            v.Capabilities.parse(data)
        except WireError:
            pass
