"""Scores of all weights of a block together, which allocation rules measure."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.models.anatomy import Block
from secateur.pruners.recipes.context import Sample


def wanda_scores(block: Block, sample: Sample) -> Float[Tensor, " weights"]:
    """Wanda's ``|w| ||x||`` of the weights of all projections, in fp32, with moments of the dense model's inputs."""
    inputs = sample.statistics.inputs(block.index)
    scores = [linear.weight.float().abs() * inputs[linear.name].norm for linear in block.linears]
    return torch.cat([score.flatten() for score in scores])
