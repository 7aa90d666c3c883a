"""GBLM-Pruner: weight times input norm and gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.statistics import InputStatistics

SCALE = 100
"""Factor of the gradients in the released script."""


def gblm(
    weight: Float[Tensor, "out in"],
    inputs: InputStatistics | None,
    generator: torch.Generator,
    *,
    gradients: Mapping[Kind, Float[Tensor, "out in"]] | None = None,
    windows: tuple[int, int] = (0, 0),
    dampening: float = 0.0,  # unused
) -> Float[Tensor, "out in"]:
    """``|w| (||x|| + 100 sqrt(N / L) g)``, compared per output (Das et al. 2023, arXiv 2311.04902, eq. 5).

    The factor turns the released script's weighting into our units: its gradients are times 100, their squares are
    summed over the N windows, and squares of inputs are summed over a window's L tokens and meant over windows; here g
    and ||x|| are root mean squares over windows and over tokens. It is 25 for the script's 128 windows of 2048
    tokens, as in the formula `gblm`.

    Args:
        gradients: of the weight, with the root mean squares.
        windows: N and L.
    """
    assert inputs is not None, "collected where the table says that the metric needs it"
    assert gradients is not None, "collected where the table says that the metric needs them"
    n_windows, length = windows
    factor = SCALE * math.sqrt(n_windows / length)
    return weight.abs().float() * (inputs.norm + factor * gradients["rms"].to(weight.device))
