# SPDX-License-Identifier: Apache-2.0
"""Registers in PCI configuration space that act: BAR window, function level reset, power state.

Virtio 1.4, *PCI configuration access capability*; PCI Express Base Specification, Device Control
and PMCSR.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from vfio_user import ConfigSpace, Region, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vballoon.virtio_pci.layout import Capabilities

__all__ = ("ConfigHooks",)

log = logging.getLogger(__name__)

_FLR = 0x80  # bit 15 of Device Control, in its upper byte
_D0, _D3HOT = 0, 3


class ConfigHooks:
    """Acts on writes to *config*.  *reset* is called for a reset of the whole function."""

    def __init__(
        self,
        config: ConfigSpace,
        caps: Capabilities,
        regions: Sequence[Region],
        reset: Callable[[], None],
    ) -> None:
        self._config, self._caps, self._regions, self._reset = config, caps, regions, reset
        self._power_state = _D0
        data = caps.pci_cfg + 16
        config.on_read(data, 4, partial(self._window, write=False))
        config.on_write(data, 4, partial(self._window, write=True))
        config.on_write(caps.express + 8, 2, self._flr)
        config.on_write(caps.power + 4, 1, self._power)

    def restore(self) -> None:
        """Follow configuration space, which was reset or restored."""
        self._power_state = self._config.data[self._caps.power + 4] & 3

    def _window(self, _offset: int, _size: int, *, write: bool) -> None:
        """Access a BAR through configuration space; ignore what the driver must not do."""
        config, at = self._config, self._caps.pci_cfg
        bar, length = config.data[at + 4], config.long(at + 12)
        offset, data = config.long(at + 8), at + 16
        if length not in (1, 2, 4) or offset % length or bar > 5:
            return
        region = self._regions[bar]
        try:
            if write:
                region.access_write(offset, bytes(config.data[data : data + length]))
            else:
                config.data[data : data + length] = region.access_read(offset, length)
        except RequestError as error:
            log.debug("PCI configuration access refused: %s", error)

    def _flr(self, _offset: int, _size: int) -> None:
        high = self._caps.express + 9
        if self._config.data[high] & _FLR:
            self._config.data[high] &= ~_FLR & 0xFF
            self._reset()

    def _power(self, _offset: int, _size: int) -> None:
        """From D3hot to D0 is a reset, as No_Soft_Reset is clear."""
        before = self._power_state
        self.restore()
        if before == _D3HOT and self._power_state == _D0:
            self._reset()
