"""The residual stream at the borders of a model's blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.stream import Walk
from secateur.pruners.models.anatomy import Anatomy


@torch.no_grad()
def stream_states(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"]
) -> Iterator[Float[Tensor, "windows length width"]]:
    """The input of the first block, then the output of each block, with the weights that it has when it is its turn.

    Memory beyond the model: the states at one border, twice.
    """
    walk = Walk(anatomy, tokens)
    yield torch.cat(walk.hidden)
    for block in anatomy.blocks:
        walk.hidden = walk.through(block)
        yield torch.cat(walk.hidden)
