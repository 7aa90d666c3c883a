"""Random scores: the baseline below which no metric may fall."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics


def random(
    weight: Float[Tensor, "out in"], inputs: InputStatistics | None, generator: torch.Generator
) -> Float[Tensor, "out in"]:
    """Uniform noise: the baseline below which no metric may fall. Seeded by the study's seed and the layer."""
    return torch.rand(weight.shape, generator=generator).to(weight.device)
