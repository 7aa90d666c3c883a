"""Wanda with tokens weighted by the damage that pruning does to their predictions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.statistics import InputStatistics


def damage_wanda(
    weight: Float[Tensor, "out in"],
    inputs: InputStatistics | None,
    generator: torch.Generator,
    *,
    gradients: Mapping[Kind, Float[Tensor, " in"]] | None = None,
    windows: tuple[int, int] = (0, 0),
    dampening: float = 0.0,  # unused
) -> Float[Tensor, "out in"]:
    """``|w|`` times the input's norm over tokens that count by their damage, compared per output. Ours.

    Wanda's score (Sun et al. 2023, arXiv 2306.11695), for weights that matter where pruning hurts: few tokens carry
    most of the divergence. See `token_damage` for a token's weight.

    Args:
        gradients: of the weight, with the weighted norms.
    """
    assert gradients is not None, "collected where the table says that the metric needs them"
    return weight.abs().float() * gradients["damage_norms"].to(weight.device)
