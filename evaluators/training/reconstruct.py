"""Reconstruction of the dense model's blocks, one after the other, as a loss of training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.runner import BlockRunner


@dataclass(frozen=True)
class Place:
    """Place of a step in a run that trains block after block.

    Args:
        block: index of the one that it trains.
        step: from 0, of the block's own steps.
        n_steps: of the block.
    """

    block: int
    step: int
    n_steps: int

    @classmethod
    def of(cls, step: int, n_steps: int, n_blocks: int) -> Place:
        """Place of a step of so many for so many blocks, each with as many steps but for rounding."""
        block = step * n_blocks // n_steps
        start, end = (-(-index * n_steps // n_blocks) for index in (block, block + 1))
        return cls(block, step - start, end - start)


def block_loss(
    anatomy: Anatomy, tokens: Int[Tensor, "batch length"], teacher: Anatomy, index: int
) -> Float[Tensor, ""]:
    """Mean squared difference between a block's output and that of the dense model's for the same input.

    PERP's reconstruction (Zimmer et al. 2023, arXiv 2312.15230): the input is that behind the pruned blocks before,
    as they are trained by then, so that memory is that of a block's activations.

    Args:
        anatomy: the pruned model.
        tokens: to compare on.
        teacher: the dense model with weights of its own.
        index: of the block.

    Raises:
        ValueError: if the pruned stream is narrower than the dense one.
    """
    runner, dense = BlockRunner(anatomy), BlockRunner(teacher)
    inputs, given = runner.start(tokens), dense.start(tokens)
    if inputs.hidden.shape != given.hidden.shape:
        raise ValueError(
            f"Expected a pruned model with all hidden channels for the loss reconstruct, got "
            f"{inputs.hidden.shape[-1]} of {given.hidden.shape[-1]}. Use the loss kl."
        )
    hidden = inputs.hidden
    with torch.no_grad():
        for before in range(index):
            hidden = runner.block(before, hidden, inputs)
        target = dense.block(index, hidden.to(given.hidden.dtype), given)
    found = runner.graph(index, hidden.detach(), inputs)
    return F.mse_loss(found.float(), target.to(found.device).float())
