"""Consumption of a piece of work in this process: CPU seconds, seconds on the device, and peaks of memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass
class Consumption:
    """Figures of the work within `consumed`, known once it has ended.

    Args:
        cpu_seconds: of all threads of this process; children are not counted.
        memory_bytes: largest resident memory of the process meanwhile, with all that it held before. Where the system
            can't begin anew (Linux can), the largest since the process began.
        device_seconds: between the work's first and last operation on a GPU, waits included; 0 on a CPU.
        device_bytes: largest memory of the GPU's tensors meanwhile, those before included; 0 on a CPU.
    """

    cpu_seconds: float = 0.0
    memory_bytes: int = 0
    device_seconds: float = 0.0
    device_bytes: int = 0


@contextmanager
def consumed(device: torch.device) -> Iterator[Consumption]:
    """Measure what is done in this context on a device, in a process that does nothing else."""
    found, on_gpu = Consumption(), device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(torch.cuda.current_stream(device))
    _forget_peak()
    started = time.process_time()
    yield found
    found.cpu_seconds = time.process_time() - started
    found.memory_bytes = _peak()
    if on_gpu:
        last.record(torch.cuda.current_stream(device))
        torch.cuda.synchronize(device)
        found.device_seconds = first.elapsed_time(last) / 1000
        found.device_bytes = torch.cuda.max_memory_allocated(device)


def _forget_peak() -> None:
    """Let the peak of resident memory begin anew, where the system allows it."""
    try:
        _RESET.write_text("5")
    except OSError:
        return


def _peak() -> int:
    """Peak of resident memory in bytes."""
    try:
        line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
