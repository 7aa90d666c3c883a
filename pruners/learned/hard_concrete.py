"""Hard concrete gates: relaxed 0/1 masks of units whose expected number of kept units has a gradient."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

LOW, HIGH = -0.1, 1.1
"""Ends of the stretched interval."""

TEMPERATURE = 2 / 3
EPSILON = 1e-6
BOUNDS = (math.log(1e-2), math.log(1e2))
"""Range that the logarithms of the gates' locations are kept to."""

AT_END = 0.8
"""Factor of a location in the gate's value at the end, as in the released code."""


def sampled_gates(log_alpha: Float[Tensor, " units"], generator: torch.Generator) -> Float[Tensor, " units"]:
    """Gates in [0, 1], many of them exactly 0 or 1 (Louizos et al. 2018, arXiv 1712.01312, eq. 10 to 12).

    ``min(1, max(0, sigmoid((log u - log(1 - u) + log alpha) / T) (HIGH - LOW) + LOW))`` with u uniform.
    """
    drawn = torch.rand(log_alpha.shape, generator=generator, device=log_alpha.device)
    u = EPSILON + (1 - 2 * EPSILON) * drawn
    stretched = ((u.log() - (1 - u).log() + log_alpha) / TEMPERATURE).sigmoid() * (HIGH - LOW) + LOW
    return stretched.clamp(0, 1)


def expected_kept(log_alpha: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """Chance that a gate is not 0."""
    below = torch.sigmoid(math.log(-LOW / HIGH) * TEMPERATURE - log_alpha)
    return 1 - below.clamp(EPSILON, 1 - EPSILON)


def final_gates(log_alpha: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """Values of the gates that stay."""
    return (log_alpha / TEMPERATURE * AT_END).sigmoid()


def present_gates(log_alpha: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """Gates without noise: those of the lowest locations are 0, as many as are expected to be, others as at the end."""
    n_gone = round(float((1 - expected_kept(log_alpha)).sum()))
    lowest = log_alpha.argsort(stable=True)[:n_gone]
    return final_gates(log_alpha).index_fill(0, lowest, 0.0)


def augmented_lagrangian(missing: Float[Tensor, ""], multipliers: Float[Tensor, "2"]) -> Float[Tensor, ""]:
    """``lambda_1 d + lambda_2 d^2`` of a difference from a target; lambda is ascended while the rest descends."""
    return multipliers[0] * missing + multipliers[1] * missing.square()
