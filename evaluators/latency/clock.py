"""Clocks by device, and the number of threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

Call = Callable[[], object]

WARM_UPS = 3
"""Calls before a CUDA graph is captured."""


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

    The device's second-level cache is emptied before: weights of a whole model have no room in it, those of a short
    stack would. Nothing else should run on the device.
    """
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _empty_cache(device)
        torch.cuda.synchronize()
        cpu = time.process_time()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
    cpu = time.process_time() - cpu
    return Reading(start.elapsed_time(end), 1e3 * cpu)


def _empty_cache(device: torch.device) -> None:
    """Write more bytes than the device's second-level cache holds."""
    n_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    torch.zeros(2 * n_bytes, dtype=torch.uint8, device=device)


def captured(call: Call, device: torch.device) -> Call:
    """The call as a CUDA graph, whose replay makes no call of Python; made a few times before, to warm up.

    Args:
        call: the same work on the same memory each time.

    Raises:
        ValueError: if it can't be captured.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                call()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError as error:
            raise ValueError(
                f"Expected a decode step that a CUDA graph can hold, got one that can't be captured "
                f"({' '.join(str(error).split())[:200]}). Measure with `eager`."
            ) from error
    replay: Call = graph.replay
    return replay


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
