"""Wanda: weight times input norm."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.pruners.calibration.statistics import InputStatistics
from secateur.pruners.masks import mask
from secateur.pruners.weights.method import LayerProblem


def wanda(
    weight: Float[Tensor, "out in"], inputs: InputStatistics | None, generator: torch.Generator
) -> Float[Tensor, "out in"]:
    """``|w| * ||x||``, compared per output (Sun et al. 2023, arXiv 2306.11695, eq. 1).

    The norm is the root mean square over tokens: a constant factor that no comparison sees.
    """
    assert inputs is not None, "collected where the table says that the metric needs it"
    return weight.abs().float() * inputs.norm


def wanda_mask(layer: LayerProblem, sparsity: float) -> Bool[Tensor, "out in"]:
    """Wanda's mask (True = keep) of a layer, which other methods start from."""
    score = layer.weight.float().abs() * layer.inputs.norm
    return mask(score, sparsity, comparison=layer.comparison, group_size=layer.group_size, name=layer.name)
