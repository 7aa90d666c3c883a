"""Shortened LLaMA: blocks scored by the loss without them, or by their first-order effect."""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.calibration.stream import mean_loss
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.runner import BlockRunner

N_TOKENS = 2048
"""Calibration tokens that losses are measured on; Shortened LLaMA takes 1,280."""


@torch.no_grad()
def loss_without(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], whole: ModelStatistics
) -> tuple[float, ...]:
    """Cross-entropy, in nats per token, of the model without the block: Shortened LLaMA's PPL (arXiv 2402.02834).

    Perplexity, its exponential, orders alike. On the first calibration windows, 2,048 tokens; it takes half as many
    forward passes over them as the model has blocks.
    """
    runner = BlockRunner(anatomy)
    few = tokens[: math.ceil(N_TOKENS / tokens.shape[1])].to(runner.device)
    inputs = runner.start(few)
    losses, hidden = [], inputs.hidden
    for block in anatomy.blocks:
        above = hidden
        for later in anatomy.blocks[block.index + 1 :]:
            above = runner.block(later.index, above, inputs)
        losses.append(mean_loss(anatomy, above, few))
        hidden = runner.block(block.index, hidden, inputs)
    return tuple(losses)


ENDS = (4, 2)
"""Blocks at the beginning and at the end that Taylor+ never removes."""


def taylor_plus(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], whole: ModelStatistics
) -> tuple[float, ...]:
    """Sum of ``|w g|`` over the block's projections, g of the mean loss: Shortened LLaMA's Taylor+.

    The first four and the last two blocks are removed last: the "+" (arXiv 2402.02834). Norms, which the paper
    counts too, are left out: of thousands of weights to each of theirs.
    """
    scores = []
    for block in anatomy.blocks:
        effects = (
            (linear.weight.float() * whole.gradients["mean"][linear.name].to(linear.weight.device))
            .abs()
            .sum()
            for linear in block.linears
        )
        inside = ENDS[0] <= block.index < len(anatomy.blocks) - ENDS[1]
        scores.append(float(sum(effects)) if inside else math.inf)
    return tuple(scores)
