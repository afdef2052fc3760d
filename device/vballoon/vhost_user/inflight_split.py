# SPDX-License-Identifier: Apache-2.0
"""The in-flight record of a split virtqueue ("Inflight I/O tracking", vhost-user.rst, 11.1.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vballoon.errors import ProtocolError
from vballoon.vhost_user.inflight import InflightRecord
from vballoon.virtqueue import Resubmit, RingState
from virtio_formats.vhost_user import REGION_VERSION, DescStateSplit, QueueRegionSplit

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ("SplitInflight",)

_U16 = 0xFFFF


class SplitInflight(InflightRecord):
    """Told of every take and give (:class:`~vballoon.virtqueue.InflightLog`)."""

    def __init__(self, region: NDArray[np.uint8], queue_size: int) -> None:
        super().__init__(region, QueueRegionSplit.dtype(), DescStateSplit.dtype(), queue_size)
        self._counter = 0

    def begin(self, used_idx: int) -> None:
        """Start a record from nothing, for a ring whose used index is *used_idx*."""
        self._head["version"] = 0
        self._desc["inflight"] = 0
        self._counter = 0
        for name, value in (
            ("features", 0),
            ("desc_num", self._size),
            ("last_batch_head", 0),
            ("used_idx", used_idx),
            ("version", REGION_VERSION),  # last: from here on the record counts
        ):
            self._head[name] = value

    def recover(self, used_idx: int) -> tuple[RingState, Resubmit]:
        """Return the ring's position and what was in flight; *used_idx* is the used ring's index.

        Raises :class:`~vballoon.errors.ProtocolError` ``inflight-region`` for a record that
        cannot be one of this ring.
        """
        if int(self._head["version"][0]) != REGION_VERSION:
            raise ProtocolError("inflight-region", f"version {int(self._head['version'][0])}")
        if int(self._head["desc_num"][0]) != self._size:
            raise ProtocolError("inflight-region", f"{int(self._head['desc_num'][0])} descriptors")
        self._settle_last_batch(used_idx)
        heads = np.flatnonzero(self._desc["inflight"])
        order = np.argsort(self._desc["counter"][heads], kind="stable")
        ids = heads[order].astype(np.uint16)
        self._counter = int(self._desc["counter"][heads].max()) + 1 if heads.size else 0
        state = RingState(avail=(used_idx + ids.size) & _U16, used=used_idx)
        return state, Resubmit(ids)

    def _settle_last_batch(self, used_idx: int) -> None:
        """Correct the record: a batch that reached the used ring is not in flight."""
        batch = (used_idx - int(self._head["used_idx"][0])) & _U16
        if batch > self._size:
            raise ProtocolError("inflight-region", f"{batch} buffers used since the last record")
        at = int(self._head["last_batch_head"][0])
        for _ in range(batch):
            if at >= self._size:
                raise ProtocolError("inflight-region", f"batch list leads to {at}")
            self._desc["inflight"][at] = 0
            at = int(self._desc["next"][at])
        self._head["used_idx"] = used_idx

    # -- InflightLog --------------------------------------------------------------------------

    def on_take(
        self, ids: NDArray[np.uint16], slots: NDArray[np.uint16], ring: NDArray[Any] | None
    ) -> None:
        """Buffers were taken: counters first, then the flags, in order."""
        del slots, ring
        self._desc["counter"][ids] = np.arange(
            self._counter, self._counter + ids.size, dtype=np.uint64
        )
        self._counter += int(ids.size)
        self._desc["inflight"][ids] = 1

    def before_give(self, ids: NDArray[np.uint16]) -> None:
        """List the batch, newest first."""
        previous = np.empty_like(ids)
        previous[0] = self._head["last_batch_head"][0]
        previous[1:] = ids[:-1]
        self._desc["next"][ids] = previous
        self._head["last_batch_head"] = ids[-1]

    def after_give(self, ids: NDArray[np.uint16], state: RingState) -> None:
        """Remove the published batch from the record."""
        self._desc["inflight"][ids] = 0
        self._head["used_idx"] = state.used
