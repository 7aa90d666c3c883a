"""Magnitude: the size of a weight as its importance."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics


def magnitude(
    weight: Float[Tensor, "out in"], inputs: InputStatistics | None, generator: torch.Generator
) -> Float[Tensor, "out in"]:
    """``|w|``, compared over the whole layer (Han et al. 2015, arXiv 1506.02626)."""
    return weight.abs().float()
