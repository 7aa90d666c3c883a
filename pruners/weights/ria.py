"""RIA: relative importance and activations."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics


def ria(
    weight: Float[Tensor, "out in"], inputs: InputStatistics | None, generator: torch.Generator
) -> Float[Tensor, "out in"]:
    """Relative importance and activations (Zhang et al., ICLR 2024, "Plug-and-Play", eq. 4, alpha = 1/2).

    ``(|w| / sum of its row + |w| / sum of its column) * sqrt(||x||)``, compared per output. A row or column
    of zeros counts as 0, not as NaN.
    """
    assert inputs is not None, "collected where the table says that the metric needs it"
    absolute = weight.abs().float()
    tiny = torch.finfo(torch.float32).tiny
    by_row = absolute / absolute.sum(1, keepdim=True).clamp_min(tiny)
    by_column = absolute / absolute.sum(0, keepdim=True).clamp_min(tiny)
    return (by_row + by_column) * inputs.norm.sqrt()
