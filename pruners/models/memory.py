"""Memory of devices and of this process: what is free, checked before a step that needs it, and what is resident."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def check_memory(n_bytes: int, device: torch.device, what: str, otherwise: str) -> None:
    """Raise a ValueError unless so much is free, if that can be known.

    Args:
        n_bytes: needed.
        device: that has them.
        what: that needs them, for the message.
        otherwise: advice, for the message.
    """
    left = available_bytes(device)
    if left is not None and left < n_bytes:
        raise ValueError(
            f"Expected {n_bytes / 1e9:,.2f} GB of memory for {what} on {device}, got {left / 1e9:,.2f} GB. {otherwise}"
        )


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device, if it is known: CUDA, and Linux with its control groups."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    if device.type != "cpu":
        return None
    kib = _numbers(_MEMINFO).get("MemAvailable:")
    known = [x for x in (None if kib is None else kib * 1024, _group_bytes()) if x is not None]
    return min(known, default=None)


def total_bytes(device: torch.device) -> int | None:
    """Memory of a device for this process, used or not, if it is known: CUDA; see `take_share`."""
    return int(_share * torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else None


_share = 1.0


def take_share(share: float) -> None:
    """Plan with a share of each GPU's memory from now on, where several processes use one: a fraction, at most 1."""
    global _share  # noqa: PLW0603  one process, one share
    _share = min(1.0, share)


def _group_bytes() -> int | None:
    """Free memory within the limit of the control group (version 2); files that are merely cached count as free."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or no limit
        return None
    return limit - used + _numbers(_CGROUP / "memory.stat").get("inactive_file", 0)


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name and a number, with or without a unit."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def resident_bytes(name: str = "VmRSS") -> int:
    """Resident memory of this process now, or at its peak (``VmHWM``); mapped files count. 0 where it is not known."""
    return _numbers(_STATUS).get(f"{name}:", 0) * 1024


def forget_peak() -> None:
    """Begin a new peak of resident memory at its present value, where the system allows it."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5", encoding="ascii")
