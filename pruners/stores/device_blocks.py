"""Blocks of a store on the devices of a model: those that fit stay, others are copied while the one before runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.pruners.stores.recent import n_bytes


class DeviceBlocks:
    """Tensors of the blocks of a store, on the device of each block.

    The first blocks that are asked for stay on their device, as far as the limit goes; a search goes through all blocks
    in turn, so that a cache of those used last would never have the one that it needs. Of the others there are two at a
    time: the block that is asked for, and the next one, which is copied on a stream of its own meanwhile.

    Args:
        stored: the blocks in the host's memory.
        devices: of each block.
        limit_bytes: of the blocks that stay, on all devices together.
    """

    def __init__(
        self, stored: Sequence[Mapping[str, Tensor]], devices: Sequence[torch.device], limit_bytes: int
    ) -> None:
        self._stored = stored
        self._devices = devices
        self._left = limit_bytes
        self._staying: dict[int, Mapping[str, Tensor]] = {}
        self._now: _Copy | None = None
        self._next: _Copy | None = None
        self._streams: dict[torch.device, Any] = {}

    def __getitem__(self, block: int) -> Mapping[str, Tensor]:
        if self._devices[block].type == "cpu":
            return self._stored[block]
        if block in self._staying:
            return self._staying[block]
        size = n_bytes(self._stored[block])
        if size <= self._left:
            self._left -= size
            self._staying[block] = {
                name: tensor.to(self._devices[block]) for name, tensor in self._stored[block].items()
            }
            return self._staying[block]
        return self._passed(block)

    def _passed(self, block: int) -> Mapping[str, Tensor]:
        """A block that does not stay, with the copy of the next such block begun."""
        if self._now is None or self._now.block != block:
            following = self._next
            self._now = following if following is not None and following.block == block else self._copy(block)
            self._next = None  # its memory is free before the next copy
            after = self._following(block)
            self._next = None if after is None else self._copy(after)
        return self._now.ready()

    def _following(self, block: int) -> int | None:
        n = len(self._devices)
        after = ((block + step) % n for step in range(1, n))
        return next((i for i in after if i not in self._staying and self._devices[i].type != "cpu"), None)

    def _copy(self, block: int) -> _Copy:
        device = self._devices[block]
        if device.type == "cuda" and device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return _Copy(block, self._stored[block], device, self._streams.get(device))


class _Copy:
    """Copy of a block, on its way on a stream."""

    def __init__(
        self,
        block: int,
        tensors: Mapping[str, Tensor],
        device: torch.device,
        stream: Any,
    ) -> None:
        self.block = block
        self._device = device
        self._event: Any = None
        if stream is None:
            self._tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
            return
        with torch.cuda.stream(stream):
            # A copy from pageable memory would not overlap with anything.
            pinned = {name: tensor.pin_memory() for name, tensor in tensors.items()}
            self._tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in pinned.items()}
            self._event = torch.cuda.Event()
            self._event.record(stream)

    def ready(self) -> Mapping[str, Tensor]:
        """The tensors, for the stream that uses them."""
        if self._event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._event)
            for tensor in self._tensors.values():
                tensor.record_stream(current)  # their memory is not given to others before it is done
            self._event = None
        return self._tensors
