"""The learning rate over the steps."""

from __future__ import annotations

import math


def rate(step: int, n_steps: int, warmup: float) -> float:
    """The learning rate of a step as a fraction of the largest: a linear rise, then a cosine towards 0.

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
