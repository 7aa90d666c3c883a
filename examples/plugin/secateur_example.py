"""A metric of your own: the function, and the row that names it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.spaces.methods import MethodRow

if TYPE_CHECKING:  # the row alone loads no torch
    import torch
    from torch import Tensor

    from secateur.pruners.calibration.statistics import InputStatistics


def deviation(weight: Tensor, inputs: InputStatistics, generator: torch.Generator) -> Tensor:
    """``|w|`` times the standard deviation of the input: Wanda, with the mean of the input left out.

    Args:
        weight: of a projection, (out, in).
        inputs: moments of what the projection sees on the calibration text.
        generator: for metrics that draw random numbers.

    Returns:
        A score a weight, higher = keep.
    """
    mean = inputs.total / max(inputs.n_tokens, 1)
    return weight.abs().float() * (inputs.norm.square() - mean.square()).clamp_min(0).sqrt()


DEVIATION = MethodRow(
    name="deviation",
    stage="metric",
    unit="weights",
    path="secateur_example:deviation",
    summary="|w| times the standard deviation of the input",
    needs="moments",
    comparison="output",
)
