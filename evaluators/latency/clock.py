"""Clocks for the devices that models run on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Reading:
    """What one call took.

    Args:
        wall_ms: from its start to its end.
        cpu_ms: processor time of this process, summed over its threads.
    """

    wall_ms: float
    cpu_ms: float


@runtime_checkable
class Clock(Protocol):
    """Times a call."""

    def time(self, call: Call) -> Reading:
        """Make the call, and wait until its device is done with it."""
        ...


class CpuClock:
    """For models on a CPU."""

    def time(self, call: Call) -> Reading:
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Reading(1e3 * wall, 1e3 * cpu)


class CudaClock:
    """For models on a CUDA device, which works on after a call has returned: events on its stream.

    Calls are eager, as `generate` of transformers makes them: where the device waits for Python, that counts. Nothing
    else should run on the device.

    Args:
        device: the model's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def time(self, call: Call) -> Reading:
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            cpu = time.process_time()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
        cpu = time.process_time() - cpu
        return Reading(start.elapsed_time(end), 1e3 * cpu)


def clock_of(device: torch.device) -> Clock:
    """The clock for models on the device.

    Raises:
        ValueError: if there is none.
    """
    clocks: dict[str, Callable[[], Clock]] = {"cpu": CpuClock, "cuda": lambda: CudaClock(device)}
    if device.type not in clocks:
        raise ValueError(
            f"Expected a `device` of {', '.join(clocks)}, got {device}. Measure on one of these."
        )
    return clocks[device.type]()
