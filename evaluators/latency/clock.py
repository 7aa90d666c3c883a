"""Clocks by device, and the number of threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Reading:
    """Times of one call.

    Args:
        wall_ms: from its start to its end.
        cpu_ms: processor time of this process, summed over its threads.
    """

    wall_ms: float
    cpu_ms: float


Clock = Callable[[Call], Reading]
"""Makes a call and waits until its device is done with it."""


def time_on_cpu(call: Call) -> Reading:
    """Time a model on a CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Reading(1e3 * wall, 1e3 * cpu)


def time_on_cuda(device: torch.device, call: Call) -> Reading:
    """Time a model on a CUDA device by events on its stream, as the device works on after a call has returned.

    Calls are eager, as `generate` of transformers makes them: where the device waits for Python, that counts. Nothing
    else should run on the device.
    """
    with torch.cuda.device(device):
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
    clocks: dict[str, Clock] = {"cpu": time_on_cpu, "cuda": partial(time_on_cuda, device)}
    if device.type not in clocks:
        raise ValueError(
            f"Expected a `device` of {', '.join(clocks)}, got {device}. Measure on one of these."
        )
    return clocks[device.type]


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Set the number of torch's threads while the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
