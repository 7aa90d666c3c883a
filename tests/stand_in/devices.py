"""Stand-in for CUDA devices on a CPU: tensors that say they are on a GPU, and operations that refuse to mix devices.

A tensor "on" ``cuda:1`` is one in the host's memory with a label. Operations of torch that take tensors of different
devices raise, as on a GPU; what they compute is the CPU's, so that results can be compared bit for bit. Transfers and
waits are counted. What it can't see: operations that a kernel of CUDA lacks, rounding of its own, and real overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.stand_in.labels import Events, put, where
from tests.stand_in.mode import StandIn
from tests.stand_in.streams import Event, Generator, Graph, Stream, capture


@dataclass
class Devices:
    """The stand-in devices of a test.

    Args:
        mode: active while the test runs.
        free: bytes that are free on each.
        total: bytes of each.
    """

    mode: StandIn
    free: list[int]
    total: int = 141 << 30

    @property
    def events(self) -> Events:
        return self.mode.events

    @property
    def log(self) -> list[str]:
        return Event.log


@contextmanager
def stand_in(n_devices: int = 1, free: int = 100 << 30) -> Iterator[Devices]:
    """Context with stand-in CUDA devices.

    Args:
        n_devices: how many.
        free: bytes that are free on each.
    """
    torch.compiler.disable(lambda: None)  # what it imports compares functions that are replaced here
    patch = pytest.MonkeyPatch()
    mode = StandIn(n_devices)
    devices = Devices(mode, [free] * n_devices)
    Event.log.clear()

    def index(device: Any = None) -> int:
        return (
            0 if device is None else mode.check(device).index or 0 if not isinstance(device, int) else device
        )

    def synchronize(device: Any = None) -> None:
        mode.events.waits["synchronize"] += 1
        Event.log.append("synchronize")

    replacements = {
        "is_available": lambda: True,
        "device_count": lambda: n_devices,
        "mem_get_info": lambda device=None: (devices.free[index(device)], devices.total),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 1,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": synchronize,
        "current_stream": lambda device=None: Stream(device),
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "Stand-in",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="Stand-in", L2_cache_size=1 << 20, total_memory=devices.total, major=9, minor=0
        ),
        "is_current_stream_capturing": lambda: False,
        "device": lambda device: nullcontext(),
        "stream": lambda stream: nullcontext(),
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
    }
    for name, value in replacements.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch, "Generator", Generator)
    patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: Event.log.append("record stream"))
    make = torch.Tensor._make_subclass

    def make_subclass(cls: Any, data: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return put(make(cls, data, *args, **kwargs), where(data))

    patch.setattr(torch.Tensor, "_make_subclass", staticmethod(make_subclass))
    try:
        with mode:
            yield devices
    finally:
        patch.undo()


def devices_of(model: nn.Module) -> set[torch.device]:
    """Devices that the parameters of a model are on."""
    return {where(x) for x in model.parameters()}
