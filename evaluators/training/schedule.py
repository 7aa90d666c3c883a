"""The learning rate over the steps, as a fraction of the largest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

Schedule = Literal["cosine", "constant"]


def cosine(step: int, n_steps: int, warmup: float) -> float:
    """A linear rise, then a cosine towards 0.

    No step has the rate 0: the rise begins above it, and the cosine would reach it one step after the last.

    Args:
        step: from 0.
        n_steps: of the whole run.
        warmup: fraction of the steps in which it rises.
    """
    n_rising = round(warmup * n_steps)
    if step < n_rising:
        return (step + 1) / (n_rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - n_rising) / (n_steps - n_rising)))


def constant(step: int, n_steps: int, warmup: float) -> float:
    """1 in every step: what a step does never depends on where the run ends, so that any run can be gone on with."""
    return 1.0


SCHEDULES: Mapping[Schedule, Callable[[int, int, float], float]] = MappingProxyType(
    {"cosine": cosine, "constant": constant}
)
