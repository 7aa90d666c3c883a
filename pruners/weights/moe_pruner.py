"""MoE-Pruner: weight times the norm of inputs that are weighted by the router."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics


def moe_pruner(
    weight: Float[Tensor, "out in"], inputs: InputStatistics | None, generator: torch.Generator
) -> Float[Tensor, "out in"]:
    """``|w| * ||x g||``, compared per output (Xie et al. 2024, arXiv 2410.12013, eq. 4).

    g is the weight with which the router sends a token to the expert; the norm is over the tokens that it sends there.
    Outside of experts g is 1, and the metric is Wanda's. [INFER] The inputs of an expert's output projection are
    weighted as those of the other two.
    """
    assert inputs is not None, "collected where the table says that the metric needs it"
    return weight.abs().float() * inputs.routed_norm
